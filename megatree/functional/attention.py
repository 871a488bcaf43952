"""Softmax attention of grouped query heads, with the kernels that compute it."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatree.functional import flash_attn_4
from megatree.functional.attention_blocks import blocks_of_whole_sources
from megatree.functional.attention_kernels import TileKernel, varlen, varlen_fits
from megatree.functional.attention_tiles import Mask
from megatree.functional.comm import Comm
from megatree.functional.contraction import einsum
from megatree.functional.documents import check_segment_ids
from megatree.functional.dropout import check_rate, keep
from megatree.functional.op import op
from megatree.functional.transforms import only_reverse, plain

Kernel = Literal[
    "auto", "reference", "sdpa", "cpu_flash", "flash", "flash_attn", "fa4", "cudnn", "efficient"
]


def _attention_signature(ranks: Sequence[int], names: Sequence[str]) -> str:
    """Type the operands that are there; all sources are needed, queries may be some of them."""
    # What is not said of the sources is that of the queries, which are then needed whole.
    said = all(f"source_{x}" in names or x not in names for x in ("positions", "segment_ids"))
    labels = {
        "q": "b t g r k!",
        "k": "b s! g k!",
        "v": "b s! g w!",
        "positions": "b t",
        "source_positions": "b s!",
        "key": "",
        "segment_ids": "b t",
        "source_segment_ids": "b s!",
        "sinks": "g r",
    }
    words = [
        labels[name].removeprefix("b ") if rank == 1 else labels[name]
        for name, rank in zip(names, ranks, strict=True)
    ]
    text = f"{', '.join(words)} -> b t g r w!"
    return text if said else text.replace("t", "t!")


@op(_attention_signature, linear=[[2]], comm=True)
def attention(
    comm: Comm,
    q: Float[Tensor, "b t g r k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g w"],
    positions: Int[Tensor, "*b t"] | None = None,
    source_positions: Int[Tensor, "*b s"] | None = None,
    key: int | Int[Tensor, ""] | None = None,
    segment_ids: Int[Tensor, "*b t"] | None = None,
    source_segment_ids: Int[Tensor, "*b s"] | None = None,
    sinks: Float[Tensor, "g r"] | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = "auto",
) -> Float[Tensor, "b t g r w"]:
    """Average the values, weighted by softmax(scale * query . key) over the sources a query sees.

    Masks are functions of positions and documents, never of indices: a permuted sequence gives the
    permuted result. Query head (g, r) attends to key head g. Where a layout cuts the sequence, the
    rules say how this is lowered (`Rules(lower={"attention": Ring()})`); the result is the same.

    Args:
        q: [b, t, kv_heads, group, head_dim].
        k: [b, s, kv_heads, head_dim].
        v: [b, s, kv_heads, value_dim].
        positions: tokens, [t] or [b, t]; None means 0 .. t-1.
        source_positions: tokens, [s] or [b, s]; None means those of the queries.
        key: 0-d int64 tensor (or int), needed if `dropout` is positive.
        segment_ids: the document of every query, [t] or [b, t], rising along a row; a query sees
            sources of its own document alone. None: one document.
        source_segment_ids: of the sources, [s] or [b, s]; None means those of the queries.
        sinks: a learned logit per query head, [kv_heads, group], that joins every softmax and
            brings no value; None for none.
        causal: a query sees sources at its own position and before.
        window: a query sees sources less than this many tokens away; None for all.
        scale: None means head_dim^-0.5.
        dropout: probability with which a weight is zeroed, by key and global element index.
        kernel: "reference" is plain torch, in float32 or better, for any derivative; "sdpa" the
            fused kernels of torch, which have no keyed dropout, no second derivative and (on CPU)
            no forward mode; a name of `attention_kernels` that kernel; "fa4" FlashAttention 4 (see
            `flash_attn_4.register`) for whole sequences without a mask of their own; "auto" what
            can do what is asked, fused where possible.

    Returns:
        [b, t, kv_heads, group, value_dim]; zeros for a query that sees nothing.

    Raises:
        ValueError: the kernel cannot do what is asked, or a mask has no meaning.

    Reference: Vaswani et al. 2017, arXiv:1706.03762, equation 1; Ainslie et al. 2023,
    arXiv:2305.13245 (grouped heads); Xiao et al. 2023, arXiv:2309.17453 (sinks).
    """
    check_rate(dropout, key, "attention")
    parts = comm.axis_size("t")
    check_masks(
        q.shape[1] * parts,
        k.shape[1],
        window=window,
        masked=causal or window is not None,
        operands=(positions, source_positions, segment_ids, source_segment_ids),
    )
    if (
        segment_ids is not None
        and positions is None
        and type(segment_ids) is Tensor
        and segment_ids.device.type == "cpu"
        and plain(segment_ids)
    ):
        check_segment_ids(segment_ids, "attention")
    mask = Mask(causal=causal, window=window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if parts == 1:
        source_positions = positions if source_positions is None else source_positions
        source_segment_ids = segment_ids if source_segment_ids is None else source_segment_ids
    chosen = _choose(kernel, dropout, (q, k, v))
    if chosen == "fa4":
        plain_rows = positions is None and source_positions is None and segment_ids is None
        if parts > 1 or not plain_rows or window is not None or sinks is not None:
            raise ValueError(
                "attention: kernel 'fa4' runs here on whole sequences without positions, "
                "documents, a window or sinks. Use kernel='auto'."
            )
        heads = (einsum("b t h k -> b h t k", x) for x in (q.flatten(2, 3), k, v))
        out = flash_attn_4.attend(*heads, causal=causal, scale=scale)
        return einsum("b h t k -> b t h k", out).unflatten(2, q.shape[2:4])
    # Plain positions of cut queries: tiles that need no mask.
    cut = parts > 1 and positions is None and mask.hides
    if chosen not in ("reference", "sdpa") or (
        chosen == "sdpa" and (sinks is not None or cut) and plain(q, k, v)
    ):
        ints = (positions, source_positions, segment_ids, source_segment_ids)
        return blocks_of_whole_sources(
            comm, q, k, v, ints, sinks, mask=mask, scale=scale, kernel=chosen
        )
    of_one_row = (
        parts == 1
        and positions is None
        and source_positions is None
        and (source_segment_ids is segment_ids or segment_ids is None)
        and q.shape[1] == k.shape[1]
    )
    if (
        chosen == "sdpa"
        and sinks is None
        and of_one_row
        and (segment_ids is not None or window is not None)
        and varlen_fits(q.device.type, q.dtype, q.shape[-1], v.shape[-1])
    ):
        if segment_ids is not None:
            check_segment_ids(segment_ids, "attention")
        return varlen(q, k, v, segment_ids, causal=causal, window=window, scale=scale)
    if chosen == "sdpa" and sinks is None:
        causal_alone = causal and window is None and positions is None and parts == 1
        causal_alone = causal_alone and source_positions is None and segment_ids is None
        seen = None
        if not causal_alone:
            seen = _seen(comm, q, k, mask, positions, source_positions)
            seen = _of_one_document(seen, segment_ids, source_segment_ids)
        return _sdpa(q, k, v, seen, causal=causal_alone, scale=scale)
    seen = _seen(comm, q, k, mask, positions, source_positions)
    seen = _of_one_document(seen, segment_ids, source_segment_ids)
    kept = None
    if dropout > 0.0:
        shape = (q.shape[0], *q.shape[2:4], q.shape[1], k.shape[1])
        assert key is not None
        kept = keep(comm, ("b", "g", "r", "t", "s"), shape, key, dropout, q.device)
        # Not bool / float, which is float32 and would round a float64 model's weights to 3e-8.
        kept = kept.to(torch.promote_types(q.dtype, torch.float32)) / (1.0 - dropout)
    return _reference(q, k, v, seen, kept, sinks, scale=scale)


def check_masks(
    num_queries: int,
    num_sources: int,
    *,
    window: int | None,
    masked: bool,
    operands: Sequence[object | None],
) -> None:
    """Refuse masks without a meaning.

    Args:
        num_queries, num_sources: of the whole sequence, tokens.
        window: tokens, or None.
        masked: whether positions hide anything.
        operands: positions, source positions, segment ids and source segment ids, or None each.
    """
    positions, source_positions, segments, source_segments = operands
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window} tokens. Give at least 1, or None for all.")
    if window is not None and window > num_sources:
        raise ValueError(
            f"attention: window is {window} tokens, axis 'seq' has {num_sources}. "
            f"Give at most {num_sources}, or None for all."
        )
    if masked and source_positions is None and num_queries != num_sources:
        raise ValueError(
            f"attention: {num_queries} queries and {num_sources} sources, and a mask. "
            "Give positions and source_positions, or causal=False and no window."
        )
    if source_positions is not None and positions is None:
        raise ValueError("attention: source_positions without positions. Give positions too.")
    if source_segments is not None and segments is None:
        raise ValueError("attention: source_segment_ids without segment_ids. Give both.")
    if segments is not None and source_segments is None and num_queries != num_sources:
        raise ValueError(
            f"attention: {num_queries} queries and {num_sources} sources, and segment_ids of the "
            "queries alone. Give source_segment_ids too."
        )


def _choose(kernel: str, dropout: float, operands: tuple[Tensor, ...]) -> str:
    """Return the kernel that runs; refuse one that cannot do what is asked."""
    if kernel not in get_args(Kernel):
        known = ", ".join(get_args(Kernel))
        raise ValueError(f"attention: no kernel {kernel!r}. Kernels are {known}.")
    if kernel not in ("auto", "reference") and dropout > 0.0:
        raise ValueError(
            f"attention: kernel {kernel!r} has no dropout by key, the rate is {dropout}. "
            "Use kernel='reference', or rate 0."
        )
    if kernel in get_args(TileKernel) and not plain(*operands):
        raise ValueError(
            f"attention: kernel {kernel!r} runs on ordinary tensors, not under a function "
            "transform. Use kernel='auto' or 'reference'."
        )
    if kernel != "auto":
        return kernel
    return "sdpa" if dropout == 0.0 and only_reverse(*operands) else "reference"


def _positions(comm: Comm, length: int, device: torch.device) -> Int[Tensor, " t"]:
    """Return the plain positions of this rank's queries."""
    ranges = comm.ranges("t", length)
    return torch.cat([torch.arange(a, b, device=device) for a, b in ranges])


def _seen(
    comm: Comm,
    q: Tensor,
    k: Tensor,
    mask: Mask,
    positions: Tensor | None,
    source_positions: Tensor | None,
) -> Bool[Tensor, "*b t s"] | None:
    """Return what every query sees by positions, [t, s] or [b, t, s]; None for everything."""
    if not mask.hides:
        return None
    if positions is None:
        positions = _positions(comm, q.shape[1], q.device)
        source_positions = torch.arange(k.shape[1], device=q.device)
    assert source_positions is not None
    return mask(positions, source_positions)


def _of_one_document(
    seen: Tensor | None, segments: Tensor | None, source_segments: Tensor | None
) -> Bool[Tensor, "*b t s"] | None:
    if segments is None or source_segments is None:
        return seen
    same = segments.unsqueeze(-1) == source_segments.unsqueeze(-2)
    return same if seen is None else seen & same


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kept: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = einsum("b t g r k, b s g k -> b g r t s", q.to(wide) * scale, k.to(wide))
    hidden = None
    if mask is not None:
        # The lowest number, not -inf: a query that sees nothing must give zeros, not 0/0.
        hidden = ~(mask if mask.dim() == 2 else mask[:, None, None])
        scores = scores.masked_fill(hidden, torch.finfo(wide).min)
    if sinks is not None:
        column = sinks.to(wide)[:, :, None, None].expand(*scores.shape[:-1], 1)
        p = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        p = torch.softmax(scores, dim=-1)
    if hidden is not None:
        p = p.masked_fill(hidden, 0.0)
    if kept is not None:
        p = p * kept.to(wide)
    return einsum("b g r t s, b s g k -> b t g r k", p, v.to(wide)).to(q.dtype)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float
) -> Tensor:
    # enable_gqa against copies of k and v for every query head: 24 against 33 ms forward, 96
    # against 127 ms backward (16 sequences of 256 tokens, 4 x 2 heads of 16, 2 CPU cores); folding
    # the group into t needs a mask, 48 and 104 ms.
    out = torch.nn.functional.scaled_dot_product_attention(
        einsum("b t h k -> b h t k", q.flatten(2, 3)),
        einsum("b s g k -> b g s k", k),
        einsum("b s g k -> b g s k", v),
        attn_mask=mask if mask is None or mask.dim() == 2 else mask.unsqueeze(1),
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[3] > 1,
    )
    return einsum("b h t k -> b t h k", out).unflatten(2, q.shape[2:4])
