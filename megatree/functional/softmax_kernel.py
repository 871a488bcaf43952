"""Softmax of rows of logits and its gradient in place, as Triton kernels that read them twice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Columns that a program has in registers at a time."""


@triton.jit
def _statistics(
    z, labels, top, total, own, stride, start, real: tl.constexpr, COLUMNS: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Per row: the largest logit, the sum of exponentials below it, the label's logit if here."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    largest = tl.full((), float("-inf"), tl.float32)
    sum_ = tl.full((), 0.0, tl.float32)
    for first in range(0, real, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(z + column, column < real, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        sum_ = sum_ * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    label = tl.load(labels + row) - start
    here = (label >= 0) & (label < real)
    tl.store(top + row, largest)
    tl.store(total + row, sum_)
    tl.store(own + row, tl.load(z + label, here, other=float("-inf")).to(tl.float32))


@triton.jit
def _gradient(
    z,
    labels,
    top,
    total,
    factors,
    stride,
    start,
    real: tl.constexpr,
    width: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Per row, in place: factor * (softmax - one at the label); zeros from column `real` on."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    label = tl.load(labels + row) - start
    largest, factor = tl.load(top + row), tl.load(factors + row)
    scale = factor / tl.load(total + row)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(z + column, column < real, other=float("-inf")).to(tl.float32)
        grad = tl.exp(x - largest) * scale - tl.where(column == label, factor, 0.0)
        grad = tl.where(column < real, grad, 0.0)
        tl.store(z + column, grad.to(z.dtype.element_ty), column < width)


def statistics(
    logits: Tensor, labels: Tensor, *, start: int, num_real: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a softmax of every row needs to know, over the columns of this rank.

    Args:
        logits: [n, width], rows dense; columns from `num_real` on are padding.
        labels: [n], global; -100 is nowhere.
        start: global number of the first column.
        num_real: number of columns that are classes.

    Returns:
        Float32 [n] each: the largest logit (-inf without a class), the sum of exp(logit - largest),
        the label's logit (-inf if it is elsewhere).
    """
    rows = len(logits)
    top, total, own = torch.empty(3, rows, dtype=torch.float32, device=logits.device).unbind()
    _statistics[(rows,)](
        logits, labels, top, total, own, logits.stride(0), start, num_real,
        COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    return top, total, own


def gradient_in_place(
    logits: Tensor,
    labels: Tensor,
    top: Tensor,
    total: Tensor,
    factors: Tensor,
    *,
    start: int,
    num_real: int,
) -> None:
    """Replace logits by `factors * (softmax - one-hot)`, rounded to their dtype.

    Args:
        logits, labels, start, num_real: as in `statistics`.
        top, total: float32 [n], of the whole row, all ranks together.
        factors: float32 [n], what multiplies the gradient of each row.
    """
    _gradient[(len(logits),)](
        logits, labels, top, total, factors, logits.stride(0), start, num_real, logits.shape[1],
        COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
