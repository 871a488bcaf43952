"""Random numbers as functions of (key, global index): the same bits on any mesh and any device.

A key is a 64-bit integer, either a Python int or a 0-d int64 tensor. Everything below is integer
arithmetic modulo 2**64 or a table look-up, so no result depends on vector width, tensor shape or
device. Mixing: the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
number generators", figure 15).
"""

import functools
import math
import zlib
from typing import cast

import torch
from torch import Tensor

Key = int | Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_INVERSE = pow(_GOLDEN, -1, 1 << 64)
_BINS = 1 << 14


def _signed(value: int) -> int:
    """Read 64 bits as a two's complement int64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right logically (int64 shifts are arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _times(x: Key, factor: int) -> Key:
    """Multiply modulo 2**64."""
    return _signed(x * factor) if isinstance(x, int) else x * _signed(factor)


def _mix(x: Key) -> Key:
    if isinstance(x, int):
        x &= _MASK
        x = ((x ^ (x >> 30)) * _M1) & _MASK
        x = ((x ^ (x >> 27)) * _M2) & _MASK
        return _signed(x ^ (x >> 31))
    x = (x ^ _shift(x, 30)) * _signed(_M1)
    x = (x ^ _shift(x, 27)) * _signed(_M2)
    return x ^ _shift(x, 31)


def fold(key: Key, *data: int | str | Tensor) -> Key:
    """Derive a key from a key and data (a step, a layer, a name).

    Args:
        key: int or 0-d int64 tensor.
        data: ints, strings or 0-d int64 tensors, folded in from left to right.

    Returns:
        A new key: an int if everything given is an int or str, else an int64 tensor.
    """
    for item in data:
        word = zlib.crc32(item.encode()) + (len(item) << 32) if isinstance(item, str) else item
        word = _times(word, _GOLDEN)
        if isinstance(key, int) and isinstance(word, int):
            key = _mix(_signed(key + word) ^ _signed(_GOLDEN >> 1))
        else:
            key = _mix((key + word) ^ _signed(_GOLDEN >> 1))
    return key


def bits(key: Key, index: Tensor) -> Tensor:
    """Return 64 random bits (int64) for every global element index."""
    # index * _GOLDEN + key; a kernel that inductor makes holds indices in 32 bits until it adds.
    return cast(Tensor, _mix(_mix((index + _times(key, _INVERSE)) * _signed(_GOLDEN))))


def keep_mask(key: Key, index: Tensor, rate: float) -> Tensor:
    """Return a bool mask that is False with probability `rate`, by element index."""
    return _shift(bits(key, index), 33) >= round(rate * (1 << 31))


def uniform(key: Key, index: Tensor) -> Tensor:
    """Return float64 numbers, drawn evenly from [0, 1), for every global element index."""
    return _shift(bits(key, index), 11).to(torch.float64) * 2.0**-53


@functools.cache
def _quantiles() -> Tensor:
    """Knots of the normal quantile function, scaled so that linear interpolation has variance 1."""
    knots = torch.special.ndtri((torch.arange(_BINS + 1, dtype=torch.float64) + 0.5) / (_BINS + 1))
    low, high = knots[:-1], knots[1:]
    variance = ((low * low + low * high + high * high) / 3).mean().item()
    return knots / math.sqrt(variance)


def standard_normal(key: Key, index: Tensor) -> Tensor:
    """Return float64 normals (mean 0, variance 1, |x| < 4.1) for every global element index.

    Only additions, products and look-ups: the value of an element is bit-equal on every device.
    """
    word = bits(key, index)
    knots = _quantiles().to(index.device)
    bin_ = _shift(word, 50)
    fraction = (_shift(word, 11) & ((1 << 39) - 1)).to(torch.float64) * 2.0**-39
    low = knots[bin_]
    return low + fraction * (knots[bin_ + 1] - low)


def box_index(
    shape: tuple[int, ...],
    box: tuple[tuple[int, int], ...],
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the int64 global row-major index of every element of a box of an array."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, (start, stop) in zip(shape, box, strict=True):
        along = torch.arange(start, stop, dtype=torch.int64, device=device)
        index = index.unsqueeze(-1) * size + along
    return index
