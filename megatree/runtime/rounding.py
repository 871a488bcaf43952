"""Stochastic rounding by key and global element index: unbiased, and the same on any mesh."""

import torch
from torch import Tensor

from megatree.functional import keys

CHUNK = 1 << 20
"""Elements that are drawn for at once; 64-bit words of a whole layer would be eight times it."""

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@torch.no_grad()
def stochastic_round(
    x: Tensor,
    dtype: torch.dtype,
    key: keys.Key,
    *,
    shape: tuple[int, ...] | None = None,
    box: tuple[tuple[int, int], ...] | None = None,
) -> Tensor:
    """Round every element to one of its two neighbours in `dtype`, so that its mean is kept.

    Law: what an element becomes is a function of (value, key, global index) only. Numbers that
    `dtype` has stay as they are; NaN and infinities too; finite numbers beyond the largest one
    become it.

    Args:
        x: local part of an array, in a wider dtype.
        dtype: bfloat16, float16 or float32.
        key: one per step and leaf: `fold(key, step, path)`.
        shape: of the whole array; None if `x` is it.
        box: (start, stop) of the local part, per dim; None if `x` is the whole.

    Returns:
        The local part in `dtype`.

    Raises:
        ValueError: `dtype` is no narrower float, or the box does not hold `x`.
    """
    if dtype not in _BITS or torch.finfo(x.dtype).bits <= torch.finfo(dtype).bits:
        raise ValueError(
            f"stochastic_round: from {x.dtype} to {dtype} nothing is rounded. "
            "Give float32 or float64, and round to bfloat16 or float16."
        )
    shape = tuple(x.shape) if shape is None else shape
    box = tuple((0, size) for size in shape) if box is None else box
    extents = tuple(stop - start for start, stop in box)
    inside = len(box) == len(shape) and all(
        0 <= a <= b <= size for (a, b), size in zip(box, shape, strict=True)
    )
    if not inside or extents != tuple(x.shape):
        raise ValueError(
            f"stochastic_round: box {box} of an array {list(shape)} does not hold "
            f"{list(x.shape)}. Give the box of x."
        )
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _fill(out, x, key, shape, box)
    return out


def _fill(
    out: Tensor, x: Tensor, key: keys.Key, shape: tuple[int, ...], box: tuple[tuple[int, int], ...]
) -> None:
    """Round `x` into `out`, halving the longest dim until a part is small enough."""
    if x.numel() <= CHUNK:
        out.copy_(_round(x, out.dtype, keys.bits(key, keys.box_index(shape, box, x.device))))
        return
    dim = max(range(x.dim()), key=lambda dim: x.shape[dim])
    start, stop = box[dim]
    middle = (start + stop) // 2
    for low, high in ((start, middle), (middle, stop)):
        part = slice(low - start, high - start)
        where = (slice(None),) * dim + (part,)
        _fill(out[where], x[where], key, shape, (*box[:dim], (low, high), *box[dim + 1 :]))


def _round(x: Tensor, dtype: torch.dtype, word: Tensor) -> Tensor:
    """Round up in magnitude with the probability that keeps the mean; 53 bits of `word` decide."""
    bits = _BITS[dtype]
    nearest = x.to(dtype)
    # Sign and magnitude: one less as an integer is the neighbour toward zero, for either sign.
    beyond = nearest.to(x.dtype).abs() > x.abs()
    low = (nearest.view(bits) - beyond.to(bits)).view(dtype)
    high = (low.view(bits) + 1).view(dtype)
    base = low.double().abs()
    # Exact: numerator and denominator are multiples of the last place of x. Beyond the largest
    # number it is finite / inf = 0; for NaN and infinities it is NaN, which no number is below.
    up = (x.double().abs() - base) / (high.double().abs() - base)
    uniform = ((word >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    return torch.where(uniform < up, high, low)
