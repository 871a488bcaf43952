"""Kernels that return the log-sum-exp beside the result, so that results over parts of the sources
merge.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatree.functional import flash_attn_package
from megatree.functional.contraction import einsum
from megatree.functional.documents import cu_seqlens_of

TileKernel = Literal["plain", "cpu_flash", "flash", "flash_attn", "cudnn", "efficient"]

_HALF = (torch.bfloat16, torch.float16)
_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Chosen:
    """A kernel and the reason for it, as `explain` prints them."""

    name: TileKernel
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def choose_tile_kernel(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    *,
    masked: bool,
    kernel: str = "auto",
    capability: tuple[int, int] = (9, 0),
) -> Chosen:
    """Return the kernel for a tile.

    Args:
        device: "cpu" or "cuda".
        dtype: of q, k and v.
        head_dim, value_dim: widths of a key and a value.
        masked: whether the tile needs a mask of its own (else it is full or causal).
        kernel: "auto", "reference" (plain torch), or a kernel's name.
        capability: compute capability of a GPU.

    Raises:
        ValueError: the kernel that is asked for cannot do this.
    """
    why = {name: _unfit(name, device, dtype, head_dim, value_dim, masked) for name in _ORDER}
    if kernel in ("reference", "plain"):
        return Chosen("plain", "asked for")
    if kernel not in ("auto", "sdpa"):
        if kernel not in _ORDER:
            known = ", ".join(["auto", "reference", "sdpa", *get_args(TileKernel)])
            raise ValueError(f"attention: no kernel {kernel!r}. Kernels are {known}.")
        if why[kernel]:
            raise ValueError(
                f"attention: kernel {kernel!r} {why[kernel]}. Use kernel='auto' or 'reference'."
            )
        return Chosen(kernel, "asked for")  # type: ignore[arg-type]
    for name in _ORDER:
        if name == "cudnn" and capability < (9, 0):
            continue  # flash is the faster one before Hopper
        if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
            continue  # its backward adds in any order
        if not why[name]:
            padded = value_dim != head_dim and name in _EQUAL
            note = f", values padded from {value_dim} to {head_dim}" if padded else ""
            return Chosen(name, f"{_REASONS[name]}{note}")
    rest = "; ".join(f"{name} {reason}" for name, reason in why.items() if _on(name) == device)
    return Chosen("plain", rest or f"no fused kernel on {device}")


_ORDER: tuple[TileKernel, ...] = ("cpu_flash", "cudnn", "flash_attn", "flash", "efficient")
_EQUAL = ("cpu_flash", "flash", "flash_attn")
"""Kernels whose values must be as wide as keys: narrower ones are padded with zeros."""
_REASONS: dict[str, str] = {
    "cpu_flash": "the fused kernel of a CPU, returns its log-sum-exp",
    "cudnn": "half precision without a mask on Hopper or later",
    "flash_attn": "half precision without a mask, by the package that is installed",
    "flash": "half precision without a mask",
    "efficient": "takes a mask, and float32",
}


def _on(name: str) -> str:
    return "cpu" if name == "cpu_flash" else "cuda"


def _unfit(
    name: str, device: str, dtype: torch.dtype, head_dim: int, value_dim: int, masked: bool
) -> str:
    """Return why a kernel cannot do it; "" if it can."""
    if _on(name) != device:
        return f"runs on {_on(name)}, not on {device}"
    if value_dim > head_dim and name in _EQUAL:
        return f"needs values no wider than keys ({head_dim})"
    if name == "cpu_flash":
        return ""
    if name == "flash_attn" and not flash_attn_package.installed():
        return "is not installed"
    if name in ("flash", "flash_attn", "cudnn"):
        if dtype not in _HALF:
            return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        if masked:
            return "takes no mask"
        if head_dim != value_dim and name == "cudnn":
            return f"needs values as wide as keys ({head_dim})"
        most = 128 if name == "cudnn" else 256
        if head_dim % 8 or head_dim > most:
            return f"needs a head_dim divisible by 8, at most {most}, not {head_dim}"
        return ""
    if dtype == torch.float64:
        return "has no float64"
    return "" if head_dim % 8 == 0 and value_dim % 8 == 0 else "needs head_dims divisible by 8"


def tile_forward(
    kernel: TileKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to one tile.

    Args:
        kernel: what runs.
        q: [b, g r, t, k], query head (g, r) of key head g.
        k, v: [b, g, s, k], [b, g, s, w].
        mask: bool [t, s] or [b, t, s], True where seen; None for all.
        causal: query i sees sources 0 .. i (t = s, no mask).
        scale: of the scores.

    Returns:
        [b, g r, t, w], and the log-sum-exp of the scores [b, g r, t] in float32 or better; zeros
        and -inf for a query that sees nothing.
    """
    if kernel == "plain":
        return _plain_forward(q, k, v, _seen(q, k, mask, causal), scale)
    if kernel in _EQUAL and v.shape[-1] < q.shape[-1]:
        width, v = v.shape[-1], _as_wide(v, q)
        out, lse = tile_forward(kernel, q, k, v, mask, causal=causal, scale=scale)
        return out[..., :width], lse
    if kernel == "cpu_flash":
        bias = _bias(mask, q.dtype)
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif kernel == "flash":
        found = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        out, lse = found[0], found[1]
    elif kernel == "flash_attn":
        out, lse = flash_attn_package.forward(q, k, v, causal=causal, scale=scale)
    elif kernel == "cudnn":
        found = _ATEN._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        out, lse = found[0], found[1].reshape(q.shape[:3])
    else:
        wide_k, wide_v = (_per_query_head(x, q.shape[1]) for x in (k, v))
        bias = _aligned_bias(mask, q)
        found = _ATEN._scaled_dot_product_efficient_attention(
            q, wide_k, wide_v, bias, True, 0.0, causal, scale=scale
        )
        out, lse = found[0], found[1][:, :, : q.shape[2]]
    if mask is not None:
        # Fused kernels give 0 (or NaN) as the log-sum-exp of nothing.
        blind = ~mask.any(-1)
        blind = blind if mask.dim() == 2 else blind.unsqueeze(1)
        lse = lse.masked_fill(blind, -torch.inf)
        out = out.masked_fill(blind.unsqueeze(-1), 0.0)
    return out, lse


def tile_backward(
    kernel: TileKernel,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one tile adds to the gradients of q, k and v.

    Args:
        grad: cotangent of the merged result, in its dtype.
        out, lse: merged over all sources: a tile's weights are exp(score - lse) of these.
        kernel, q, k, v, mask, causal, scale: as in `tile_forward`.
    """
    if kernel == "plain":
        return _plain_backward(grad, q, k, v, out, lse, _seen(q, k, mask, causal), scale)
    if kernel in _EQUAL and v.shape[-1] < q.shape[-1]:
        width = v.shape[-1]
        grad, v, out = (_as_wide(x, q) for x in (grad, v, out))
        dq, dk, dv = tile_backward(
            kernel, grad, q, k, v, out, lse, mask, causal=causal, scale=scale
        )  # fmt: skip
        return dq, dk, dv[..., :width]
    # exp(-inf - -inf) is NaN; a query that sees nothing has no weights, whatever its lse.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    if kernel == "cpu_flash":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_bias(mask, q.dtype), scale=scale
        )
    if kernel == "flash_attn":
        return flash_attn_package.backward(grad, q, k, v, out, lse, causal=causal, scale=scale)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    t, s = q.shape[2], k.shape[2]
    if kernel == "flash":
        seeds = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return _ATEN._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, t, s, 0.0, causal, seeds, seed,
            scale=scale,
        )  # fmt: skip
    if kernel == "cudnn":
        return _ATEN._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse.contiguous().unsqueeze(-1), seed, seed, None, None, None, t, s,
            0.0, causal, scale=scale,
        )  # fmt: skip
    wide_k, wide_v = (_per_query_head(x, q.shape[1]) for x in (k, v))
    # The kernel takes it for granted that the rows of `out` lie as it would have written them.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.nn.functional.pad(lse, (0, -t % 32), value=torch.inf)
    dq, dk, dv, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
        grad, q, wide_k, wide_v, _aligned_bias(mask, q), out, padded, seed, seed, 0.0,
        [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    group = q.shape[1] // k.shape[1]
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def varlen_fits(device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    """Whether `varlen` runs here: documents and windows in one fused kernel, without a mask."""
    return not _unfit("flash", device, dtype, head_dim, value_dim, masked=False)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend within documents of packed rows (and a window): flash attention's varlen form.

    Args:
        q: [b, t, g, r, k]; k, v: [b, t, g, k], [b, t, g, w], w at most k.
        segment_ids: [t] or [b, t], rising along a row; None for a document per row.
        causal, window, scale: as in `attention`.
    """
    batch, length = q.shape[:2]
    if segment_ids is None:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
    else:
        starts = cu_seqlens_of(segment_ids.expand(batch, length))
    reach = -1 if window is None else window - 1
    width, v = v.shape[-1], _as_wide(v, q)
    found = _ATEN._flash_attention_forward(
        q.flatten(2, 3).flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        starts,
        starts,
        length,
        length,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=reach,
        window_size_right=0 if causal else reach,
    )
    return found[0].view(q.shape)[..., :width]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which results merge: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def _as_wide(x: Tensor, q: Tensor) -> Tensor:
    """Pad the last dim with zeros to the width of a query."""
    return torch.nn.functional.pad(x, (0, q.shape[-1] - x.shape[-1]))


def _seen(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if not causal:
        return mask
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()


def _plain_scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Return [b, g, r, t, s] scores, -inf where nothing is seen."""
    dtype = wide(q.dtype)
    heads = q.to(dtype).unflatten(1, (k.shape[1], -1))
    scores = einsum("b g r t k, b g s k -> b g r t s", heads * scale, k.to(dtype))
    if seen is None:
        return scores
    return scores.masked_fill(~(seen if seen.dim() == 2 else seen[:, None, None]), -torch.inf)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    scores = _plain_scores(q, k, seen, scale)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    out = einsum("b g r t s, b g s w -> b g r t w", p, v.to(p.dtype))
    return out.flatten(1, 2), lse.flatten(1, 2)


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _plain_scores(q, k, seen, scale)
    split = (k.shape[1], -1)
    lse = lse.masked_fill(lse == -torch.inf, 0.0).unflatten(1, split)
    p = torch.exp(scores - lse.unsqueeze(-1))
    g = grad.to(p.dtype).unflatten(1, split)
    delta = (g * out.to(p.dtype).unflatten(1, split)).sum(-1, keepdim=True)
    dv = einsum("b g r t s, b g r t w -> b g s w", p, g)
    dp = einsum("b g r t w, b g s w -> b g r t s", g, v.to(p.dtype))
    ds = p * (dp - delta) * scale
    dq = einsum("b g r t s, b g s k -> b g r t k", ds, k.to(p.dtype))
    dk = einsum("b g r t s, b g r t k -> b g s k", ds, q.to(p.dtype).unflatten(1, split))
    return dq.flatten(1, 2), dk, dv


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return bias if mask.dim() == 2 else bias.unsqueeze(1)


def _aligned_bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the mask as a bias of q's shape whose rows start at multiples of 16 bytes."""
    if mask is None:
        return None
    full = mask.expand(q.shape[0], -1, -1) if mask.dim() == 2 else mask
    rows = full.shape[-1]
    bias = torch.zeros((*full.shape[:-1], -(-rows // 16) * 16), dtype=q.dtype, device=q.device)[
        ..., :rows
    ]
    bias.masked_fill_(~full, -torch.inf)
    return bias.unsqueeze(1).expand(-1, q.shape[1], -1, -1)


def _per_query_head(x: Tensor, num_heads: int) -> Tensor:
    """Repeat key heads for the kernel that has no groups; only here, never on a wire."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)
