"""A 64-bit hash of a tensor's bits, computed where it is; equal on any device."""

import torch
from torch import Tensor

_WIDTH = 1 << 14
"""Elements of a row: each has a factor of its own."""

_ROWS = 1 << 8
"""Rows at once: 32 MiB of int64."""

_SIZES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Size of an element -> as what it is read; of 64 bits the upper ones would hardly count."""


def hash_bits(x: Tensor, seed: int = 0) -> Tensor:
    """Return a hash of a tensor's elements, bit by bit and in order, as a scalar int64.

    Law: tensors of a shape that differ in one element have different hashes; others do but for
    one pair in 2^63. Every element is multiplied by an odd factor of its place, and all are
    added, modulo 2^64: no order of the sum and no device changes it. NaNs and zeros of either
    sign count by their bits.

    Args:
        x: of any dtype of up to 8 bytes an element, in any layout.
        seed: makes another hash, for tensors that are hashed side by side.
    """
    flat = x.detach().contiguous().view(-1)
    bits = flat.view(_SIZES[flat.element_size()])
    factors = _factors(_WIDTH, seed, x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    step = _WIDTH * _ROWS
    for at in range(0, bits.numel(), step):
        part = bits[at : at + step]
        num_rows = part.numel() // _WIDTH
        rows = [(part[: num_rows * _WIDTH].view(-1, _WIDTH) * factors).sum(1)] if num_rows else []
        if rest := part.numel() - num_rows * _WIDTH:
            rows.append((part[-rest:] * factors[:rest]).sum(0, keepdim=True))
        sums = torch.cat(rows)
        total = total + (sums * _factors(len(sums), seed + 1 + at // step, x.device)).sum()
    return total


def mix(x: Tensor) -> Tensor:
    """Scramble int64 values (the finaliser of SplitMix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _logical_shift(x, shift)) * factor
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _factors(size: int, seed: int, device: torch.device) -> Tensor:
    """Return odd factors, one per place."""
    at = torch.arange(size, dtype=torch.int64, device=device)
    return mix(at + (seed << 32)) | 1
