"""Softmax attention of grouped query heads, with the kernels that compute it."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatree.functional.comm import Comm
from megatree.functional.contraction import einsum
from megatree.functional.dropout import check_rate, keep
from megatree.functional.op import op
from megatree.functional.transforms import only_reverse

Kernel = Literal["auto", "reference", "sdpa"]


def _attention_signature(ranks: Sequence[int]) -> str:
    """Type q, k, v and whichever of positions [t] or [b, t] and key [] are there."""
    extra = {0: [""], 1: ["t!", "s!"], 2: ["b t!", "b s!"]}
    rest = [extra[rank].pop(0) if rank == 0 else extra[rank][i] for i, rank in enumerate(ranks[3:])]
    operands = ["b t! g r k!", "b s! g k!", "b s! g w!", *rest]
    return ", ".join(operands) + " -> b t! g r w!"


@op(_attention_signature, linear=[[2]], comm=True)
def attention(
    comm: Comm,
    q: Float[Tensor, "b t g r k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g w"],
    positions: Int[Tensor, "*b t"] | None = None,
    source_positions: Int[Tensor, "*b s"] | None = None,
    key: int | Int[Tensor, ""] | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = "auto",
) -> Float[Tensor, "b t g r w"]:
    """Average the values, weighted by softmax(scale * query . key) over the sources a query sees.

    Masks are functions of positions, never of indices: a permuted sequence gives the permuted
    result. Query head (g, r) attends to key head g.

    Args:
        q: [b, t, kv_heads, group, head_dim].
        k: [b, s, kv_heads, head_dim].
        v: [b, s, kv_heads, value_dim].
        positions: tokens, [t] or [b, t]; None means 0 .. t-1.
        source_positions: tokens, [s] or [b, s]; None means those of the queries.
        key: 0-d int64 tensor (or int), needed if `dropout` is positive.
        causal: a query sees sources at its own position and before.
        window: a query sees sources less than this many tokens away; None for all.
        scale: None means head_dim^-0.5.
        dropout: probability with which a weight is zeroed, by key and global element index.
        kernel: "reference" is plain torch, in float32 or better, for any derivative; "sdpa" the
            fused kernels of torch, which have no keyed dropout, no second derivative and (on CPU)
            no forward mode; "auto" takes sdpa where it can do what is asked.

    Returns:
        [b, t, kv_heads, group, value_dim]; zeros for a query that sees nothing.

    Raises:
        ValueError: the kernel cannot do what is asked, or a mask has no meaning.

    Reference: Vaswani et al. 2017, arXiv:1706.03762, equation 1; Ainslie et al. 2023,
    arXiv:2305.13245 (grouped heads).
    """
    check_rate(dropout, key, "attention")
    _check_masks(q.shape[1], k.shape[1], positions, source_positions, causal, window)
    plain_causal = causal and window is None and positions is None and source_positions is None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _choose(kernel, dropout, (q, k, v)) == "sdpa":
        mask = None
        if (causal or window is not None) and not plain_causal:
            mask = _mask(q, k, positions, source_positions, causal, window)
        return _sdpa(q, k, v, mask, causal=plain_causal, scale=scale)
    mask = None
    if causal or window is not None:
        mask = _mask(q, k, positions, source_positions, causal, window)
    kept = None
    if dropout > 0.0:
        shape = (q.shape[0], *q.shape[2:4], q.shape[1], k.shape[1])
        assert key is not None
        kept = keep(comm, ("b", "g", "r", "t", "s"), shape, key, dropout, q.device)
        # Not bool / float, which is float32 and would round a float64 model's weights to 3e-8.
        kept = kept.to(torch.promote_types(q.dtype, torch.float32)) / (1.0 - dropout)
    return _reference(q, k, v, mask, kept, scale=scale)


def _check_masks(
    num_queries: int,
    num_sources: int,
    positions: Tensor | None,
    source_positions: Tensor | None,
    causal: bool,
    window: int | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window} tokens. Give at least 1, or None for all.")
    if (causal or window is not None) and source_positions is None and num_queries != num_sources:
        raise ValueError(
            f"attention: {num_queries} queries and {num_sources} sources, and a mask. "
            "Give positions and source_positions, or causal=False and no window."
        )
    if source_positions is not None and positions is None:
        raise ValueError("attention: source_positions without positions. Give positions too.")


def _choose(kernel: str, dropout: float, operands: tuple[Tensor, ...]) -> str:
    """Return the kernel that runs; refuse one that cannot do what is asked."""
    if kernel not in get_args(Kernel):
        known = ", ".join(get_args(Kernel))
        raise ValueError(f"attention: no kernel {kernel!r}. Kernels are {known}.")
    if kernel == "sdpa" and dropout > 0.0:
        raise ValueError(
            f"attention: kernel 'sdpa' has no dropout by key, the rate is {dropout}. "
            "Use kernel='reference', or rate 0."
        )
    if kernel != "auto":
        return kernel
    return "sdpa" if dropout == 0.0 and only_reverse(*operands) else "reference"


def _mask(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    source_positions: Tensor | None,
    causal: bool,
    window: int | None,
) -> Bool[Tensor, "*b t s"]:
    """Return what every query sees, [t, s] or [b, t, s]."""
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device)
    if source_positions is None:
        source_positions = positions
    distance = positions.unsqueeze(-1) - source_positions.unsqueeze(-2)
    if window is None:
        return distance >= 0
    near = distance < window
    return near & (distance >= 0) if causal else near & (distance > -window)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kept: Tensor | None, *, scale: float
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = einsum("b t g r k, b s g k -> b g r t s", q.to(wide) * scale, k.to(wide))
    if mask is None:
        p = torch.softmax(scores, dim=-1)
    else:
        # The lowest number, not -inf: a query that sees nothing must give zeros, not 0/0.
        hidden = ~(mask if mask.dim() == 2 else mask[:, None, None])
        lowest = torch.finfo(wide).min
        p = torch.softmax(scores.masked_fill(hidden, lowest), dim=-1).masked_fill(hidden, 0.0)
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
