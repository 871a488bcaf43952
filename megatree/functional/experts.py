"""The feed-forward layers of local experts, over rows that are sorted by expert."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Products = Literal["auto", "loop", "grouped"]


def expert_rows(
    rows: Float[Tensor, "n embed"],
    gates: Float[Tensor, "n 1"],
    counts: Sequence[int],
    weights: Sequence[Tensor],
    activation: Callable[..., Tensor],
    *,
    products: Products = "auto",
) -> Float[Tensor, "n embed"]:
    """Apply to every row the layer of its expert, times the row's gate.

    The gate multiplies what enters the last product, so that the backward needs no result.

    Args:
        rows: sorted by expert.
        gates: of the rows.
        counts: rows of every expert; any may be 0.
        weights: ([gate,] up, down), each [experts, ffn, embed].
        activation: of (up), or of (gate, up) if there is a gate.
        products: "loop" takes one product per expert, and is the reference; "grouped" one
            `torch._grouped_mm` for all; "auto" takes this on GPUs in bfloat16, where sizes allow.

    Raises:
        ValueError: grouped products are asked for and cannot be had.
    """
    why = _why_not_grouped(rows, weights)
    if products == "grouped" and why:
        raise ValueError(f'experts: no grouped product: {why}. Use products="loop".')
    if products == "grouped" or (products == "auto" and rows.is_cuda and not why):
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        offsets = ends.to(rows.device, non_blocking=True)
        into = [torch._grouped_mm(rows, w.transpose(1, 2), offs=offsets) for w in weights[:-1]]
        return torch._grouped_mm(_gated(into, gates, activation), weights[-1], offs=offsets)
    out = []
    for r, g, *ws in zip(
        rows.split(list(counts)),
        gates.split(list(counts)),
        *(w.unbind(0) for w in weights),
        strict=True,
    ):
        hidden = _gated([r @ w.t() for w in ws[:-1]], g, activation)
        out.append(hidden @ ws[-1])
    return torch.cat(out)


def expert_slots(
    slots: Float[Tensor, "e n embed"],
    gates: Float[Tensor, "e n 1"],
    weights: Sequence[Tensor],
    activation: Callable[..., Tensor],
) -> Float[Tensor, "e n embed"]:
    """Apply the layers of experts to as many rows each; see `expert_rows`."""
    into = [torch.bmm(slots, w.transpose(1, 2)) for w in weights[:-1]]
    return torch.bmm(_gated(into, gates, activation), weights[-1])


def _gated(into: Sequence[Tensor], gates: Tensor, activation: Callable[..., Tensor]) -> Tensor:
    hidden = activation(*into)
    return (hidden * gates).to(hidden.dtype)


def _why_not_grouped(rows: Tensor, weights: Sequence[Tensor]) -> str:
    """Return why there is no grouped product for these, or nothing."""
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has none"
    if rows.dtype is not torch.bfloat16 and (rows.is_cuda or rows.dtype is not torch.float32):
        return f"it is not made for {rows.dtype} on {rows.device.type}"
    odd = [n for n in weights[0].shape[1:] if n * rows.element_size() % 16]
    return f"sizes {odd} are not multiples of 16 bytes" if odd else ""
