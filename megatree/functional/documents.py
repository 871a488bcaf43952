"""Packed documents: which document a token belongs to, and where it is in it."""

import torch
from jaxtyping import Int
from torch import Tensor


def segment_ids_of(cu_seqlens: Int[Tensor, " n"], length: int) -> Int[Tensor, " t"]:
    """Return the document of every token of a packed row: 0, 0, .., 1, 1, ..

    Args:
        cu_seqlens: tokens, [documents + 1]: where each document starts, 0 first, and the row's end.
        length: tokens in the row.

    Returns:
        [length]; tokens after the last document are one document more.

    Raises:
        ValueError: the starts fall, or do not begin at 0, or pass the row's end.

    >>> segment_ids_of(torch.tensor([0, 2, 5]), 6).tolist()
    [0, 0, 1, 1, 1, 2]
    """
    starts = cu_seqlens.tolist()
    if not starts or starts[0] != 0 or starts[-1] > length or starts != sorted(starts):
        raise ValueError(
            f"cu_seqlens: {starts[:8]} are no starts of documents in a row of {length} tokens. "
            "Give rising numbers from 0 to at most the row's length."
        )
    at = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)


def cu_seqlens_of(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, " n"]:
    """Return where documents start in rows laid end to end, and the end, int32.

    A row always starts a document.

    >>> cu_seqlens_of(torch.tensor([[0, 0, 1], [4, 4, 4]])).tolist()
    [0, 2, 3, 6]
    """
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    found = starts.flatten().nonzero()[:, 0]
    end = found.new_tensor([segment_ids.numel()])
    return torch.cat([found, end]).to(torch.int32)


def positions_of(segment_ids: Int[Tensor, "*b t"]) -> Int[Tensor, "*b t"]:
    """Return the place of every token in its document, which restarts at 0 where ids change.

    >>> positions_of(torch.tensor([3, 3, 3, 5, 5])).tolist()
    [0, 1, 2, 0, 1]
    """
    at = torch.arange(segment_ids.shape[-1], device=segment_ids.device).expand(segment_ids.shape)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    return at - torch.cummax(torch.where(starts, at, 0), -1).values


def check_segment_ids(segment_ids: Int[Tensor, "*b t"], place: str) -> None:
    """Refuse ids that fall along a row: a document would lie in two parts.

    Raises:
        ValueError: names the first such place.
    """
    falls = (segment_ids[..., 1:] < segment_ids[..., :-1]).nonzero()
    if len(falls):
        *row, at = falls[0].tolist()
        before, after = segment_ids[(*row, at)].item(), segment_ids[(*row, at + 1)].item()
        where = f"row {row[0]}, " if row else ""
        raise ValueError(
            f"{place}: segment ids fall from {before} to {after} at {where}token {at + 1} of axis "
            "'seq'. Number the documents of a row in rising order."
        )
