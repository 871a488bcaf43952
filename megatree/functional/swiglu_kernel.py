"""SwiGLU of gates and values that lie side by side, and its gradient, as Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 512
"""Elements of the result that a program makes."""


@triton.jit
def _swiglu(x, out, n, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < width)
    at = row * (2 * width) + column
    gate = tl.load(x + at, inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, inside, other=0.0).to(tl.float32)
    made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, made.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(x, g, out, n, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n) & (column < width)
    at = row * (2 * width) + column
    gate = tl.load(x + at, inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, inside, other=0.0).to(tl.float32)
    grad = tl.load(g + row * width + column, inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    of_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    of_up = grad * gate * sigmoid
    tl.store(out + at, of_gate.to(out.dtype.element_ty), inside)
    tl.store(out + at + width, of_up.to(out.dtype.element_ty), inside)


def swiglu_forward(x: Tensor) -> Tensor:
    """Return silu(gate) * up of [..., gates then ups], dense and no wider than float32."""
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    n = out.numel() // width
    _swiglu[(triton.cdiv(n, ROWS), triton.cdiv(width, COLUMNS))](
        x, out, n, width=width, ROWS=ROWS, COLUMNS=COLUMNS
    )
    return out


def swiglu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `x` for that of the result, dense too."""
    width = x.shape[-1] // 2
    out = torch.empty_like(x)
    n = x.numel() // (2 * width)
    _swiglu_backward[(triton.cdiv(n, ROWS), triton.cdiv(width, COLUMNS))](
        x, grad, out, n, width=width, ROWS=ROWS, COLUMNS=COLUMNS
    )
    return out
