"""What experts do besides products, as Triton kernels: gated SwiGLU, and rows there and back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 512
"""The tile that a program handles at once; rows that are moved get a tile of their width."""


@triton.jit
def _swiglu(
    gate, up, weight, out, n, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n)[:, None] & (column < width)
    at = row[:, None] * width + column
    g = tl.load(gate + at, inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, inside, other=0.0).to(tl.float32)
    w = tl.load(weight + row, row < n, other=0.0).to(tl.float32)[:, None]
    made = g / (1.0 + tl.exp(-g)) * u * w
    tl.store(out + at, made.to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(
    gate,
    up,
    weight,
    grad,
    of_gate,
    of_up,
    of_weight,
    n,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < n
    w = tl.load(weight + row, real, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = real[:, None] & (column < width)
        at = row[:, None] * width + column
        g = tl.load(gate + at, inside, other=0.0).to(tl.float32)
        u = tl.load(up + at, inside, other=0.0).to(tl.float32)
        d = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        total += d * g * sigmoid * u
        d = d * w
        by_gate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(of_gate + at, by_gate.to(of_gate.dtype.element_ty), inside)
        tl.store(of_up + at, (d * g * sigmoid).to(of_up.dtype.element_ty), inside)
    tl.store(of_weight + row, tl.sum(total, 1).to(of_weight.dtype.element_ty), real)


@triton.jit
def _take(
    x,
    source,
    out,
    n,
    num_choices,
    k: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n)[:, None] & (column < width)
    choice = tl.load(source + row, row < n, other=0).to(tl.int64)
    taken = inside & (choice < num_choices)[:, None]
    value = tl.load(x + (choice // k)[:, None] * width + column, taken, other=0.0)
    tl.store(out + row[:, None] * width + column, value, inside)


@triton.jit
def _put(
    y,
    place,
    out,
    n,
    num_slots,
    k: tl.constexpr,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n)[:, None] & (column < width)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.static_range(k):
        slot = tl.load(place + row * k + j, row < n, other=0).to(tl.int64)
        there = inside & (slot < num_slots)[:, None]
        total += tl.load(y + slot[:, None] * width + column, there, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * width + column, total.to(out.dtype.element_ty), inside)


def swiglu_forward(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """Return silu(gate) * up * weight; all dense, [n, f] or (the weight) [n, 1]."""
    out = torch.empty_like(gate)
    n, width = gate.shape
    if n:
        _swiglu[(triton.cdiv(n, ROWS), triton.cdiv(width, COLUMNS))](
            gate, up, weight, out, n, width=width, ROWS=ROWS, COLUMNS=COLUMNS
        )
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate, up and weight for that of the result."""
    of_gate, of_up, of_weight = (torch.empty_like(x) for x in (gate, up, weight))
    n, width = gate.shape
    if n:
        _swiglu_backward[(triton.cdiv(n, ROWS),)](
            gate, up, weight, grad, of_gate, of_up, of_weight, n,
            width=width, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return of_gate, of_up, of_weight


def take(x: Tensor, source: Tensor, k: int, num_choices: int) -> Tensor:
    """Return x[source // k], and rows of zeros where there is no choice `source`; `x` is dense."""
    n, width = source.shape[0], x.shape[1]
    out = x.new_empty(n, width)
    rows, columns = _tile(width)
    if n:
        _take[(triton.cdiv(n, rows), triton.cdiv(width, columns))](
            x, source, out, n, num_choices, k=k, width=width, ROWS=rows, COLUMNS=columns
        )
    return out


def put(y: Tensor, place: Tensor, k: int) -> Tensor:
    """Return sums of the rows `place` of `y`, k by k, without those that it has not."""
    n, width = place.shape[0] // k, y.shape[1]
    out = y.new_empty(n, width)
    rows, columns = _tile(width)
    if n:
        _put[(triton.cdiv(n, rows), triton.cdiv(width, columns))](
            y, place, out, n, y.shape[0], k=k, width=width, ROWS=rows, COLUMNS=columns
        )
    return out


def _tile(width: int) -> tuple[int, int]:
    """Return the rows and columns that a program handles at once."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return max(1, ROWS * COLUMNS // columns), columns
