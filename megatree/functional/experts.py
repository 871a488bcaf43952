"""The feed-forward layers of local experts, over rows that are sorted by expert."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatree.functional import experts_te
from megatree.functional.activations import swiglu
from megatree.functional.triton_kernels import has_kernels

Products = Literal["auto", "loop", "grouped", "transformer_engine"]


def expert_rows(
    rows: Float[Tensor, "n embed"],
    gates: Float[Tensor, "n 1"],
    counts: Sequence[int] | Tensor,
    weights: Sequence[Tensor],
    activation: Callable[..., Tensor],
    *,
    products: Products = "auto",
) -> Float[Tensor, "n embed"]:
    """Apply to every row the layer of its expert, times the row's gate.

    The gate multiplies what enters the last product, so that the backward needs no result.

    Args:
        rows: sorted by expert; after them may come rows of none, whose results mean nothing.
        gates: of the rows.
        counts: rows of every expert; any may be 0. A tensor stays on its device for the grouped
            product; the loop looks at it.
        weights: ([gate,] up, down), each [experts, ffn, embed].
        activation: of (up), or of (gate, up) if there is a gate.
        products: "loop" takes one product per expert, and is the reference; "grouped" one
            `torch._grouped_mm` for all; "auto" takes this on GPUs in bfloat16, where sizes allow;
            "transformer_engine" takes the grouped linear layer of that package, whose host looks at
            the counts.

    Raises:
        ValueError: grouped products are asked for and cannot be had.
    """
    engine = products == "transformer_engine"
    why = experts_te.why_not(rows) if engine else _why_not_grouped(rows, weights)
    if (engine or products == "grouped") and why:
        raise ValueError(f'experts: no grouped product: {why}. Use products="loop".')
    grouped = products == "grouped" or (products == "auto" and rows.is_cuda and not why)
    # A trace and a plan ask for shapes, which are the loop's: of rows without values torch refuses
    # the grouped product in dtypes in which the CPU multiplies.
    compiling = torch.compiler.is_compiling()
    shapes = rows.is_meta or (type(rows) is not Tensor and not compiling)
    if grouped and not shapes and (compiling or len(rows) > 0):
        if not isinstance(counts, Tensor):
            counts = torch.tensor(counts, dtype=torch.int32)
        ends = counts.cumsum(0, dtype=torch.int32).to(rows.device, non_blocking=True)
        # Gates and ups that lie side by side would be one product, but for a copy of both weights.
        into = [torch._grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in weights[:-1]]
        return torch._grouped_mm(_gated(into, gates, activation), weights[-1], offs=ends)
    sizes = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    taken = sum(sizes)
    several = _by_engine if engine and not rows.is_meta else _by_loop
    parts = several(rows[:taken], gates[:taken], sizes, [w.unbind(0) for w in weights], activation)
    return torch.cat([*parts, rows.new_zeros(len(rows) - taken, rows.shape[1])])


def _by_loop(
    rows: Tensor,
    gates: Tensor,
    sizes: list[int],
    weights: Sequence[Sequence[Tensor]],
    activation: Callable[..., Tensor],
) -> list[Tensor]:
    out = []
    for r, g, *ws in zip(rows.split(sizes), gates.split(sizes), *weights, strict=True):
        hidden = _gated([r @ w.t() for w in ws[:-1]], g, activation)
        out.append(hidden @ ws[-1])
    return out


def _by_engine(
    rows: Tensor,
    gates: Tensor,
    sizes: list[int],
    weights: Sequence[Sequence[Tensor]],
    activation: Callable[..., Tensor],
) -> list[Tensor]:
    *first, down = weights
    into = [experts_te.product(rows, ws, sizes) for ws in first]
    hidden = _gated(into, gates, activation)
    return [experts_te.product(hidden, [w.t() for w in down], sizes)]


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
    if activation is swiglu and has_kernels(into[0]):
        gate, up = (x.reshape(-1, x.shape[-1]) for x in into)
        return _GatedSwiglu.apply(gate, up, gates.reshape(-1, 1)).view(into[0].shape)
    hidden = activation(*into)
    return (hidden * gates).to(hidden.dtype)


class _GatedSwiglu(torch.autograd.Function):
    """silu(gate) * up * weight in one pass, and its three gradients in another."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        from megatree.functional.experts_kernel import swiglu_forward

        gate, up, weight = gate.contiguous(), up.contiguous(), weight.contiguous()
        ctx.save_for_backward(gate, up, weight)
        return swiglu_forward(gate, up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        from megatree.functional.experts_kernel import swiglu_backward

        gate, up, weight = ctx.saved_tensors
        return swiglu_backward(gate, up, weight, grad.contiguous())


def _why_not_grouped(rows: Tensor, weights: Sequence[Tensor]) -> str:
    """Return why there is no grouped product for these, or nothing."""
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has none"
    if rows.dtype is not torch.bfloat16 and (rows.is_cuda or rows.dtype is not torch.float32):
        return f"it is not made for {rows.dtype} on {rows.device.type}"
    odd = [n for n in weights[0].shape[1:] if n * rows.element_size() % 16]
    return f"sizes {odd} are not multiples of 16 bytes" if odd else ""
