"""Zigzag: an order of a cut sequence in which every rank has the same work under a causal mask."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) pairs, in the order in which their elements lie."""


@dataclass(frozen=True)
class Zigzag:
    """The order of logical axes that are cut over a mesh axis of n ranks: 2 n chunks, folded.

    Rank r holds chunks r and 2n - 1 - r: an early one, whose queries see little, and a late one.
    What the user writes, and whole values, stay in natural order; only shards lie in this one, and
    `shard` moves a value between the two. An op that looks at the order of a dim refuses it.

    Args:
        over: the mesh axis (or axes of a refined one) whose ranks share the sequence.
        axes: logical axes in this order, each cut over `over` first.
    """

    over: str = "cp"
    axes: tuple[str, ...] = ("seq", "seq_res")


def chunk_order(num_chunks: int) -> tuple[int, ...]:
    """Return the chunks of a sequence in zigzag order.

    >>> chunk_order(8)
    (0, 7, 1, 6, 2, 5, 3, 4)
    """
    return tuple(i // 2 if i % 2 == 0 else num_chunks - 1 - i // 2 for i in range(num_chunks))


@lru_cache
def natural_ranges(size: int, num_chunks: int, start: int, stop: int) -> Ranges:
    """Return where the elements start .. stop of a sequence in zigzag order are in natural order.

    Args:
        size: of the whole sequence, elements.
        num_chunks: 1 for natural order.
        start, stop: a part of the ordered sequence.

    >>> natural_ranges(16, 4, 0, 8)
    ((0, 4), (12, 16))
    """
    length = size // num_chunks
    out: list[tuple[int, int]] = []
    for place, chunk in enumerate(chunk_order(num_chunks) if num_chunks > 1 else (0,)):
        lo, hi = max(start, place * length), min(stop, (place + 1) * length)
        if lo >= hi:
            continue
        a, b = (x - place * length + chunk * length for x in (lo, hi))
        if out and out[-1][1] == a:
            out[-1] = out[-1][0], b
        else:
            out.append((a, b))
    return tuple(out)


def places(size: int, num_chunks: int) -> list[int]:
    """Return the natural index of every element of a sequence in zigzag order: the permutation
    that a loader applies to its columns.

    >>> places(8, 4)
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return [i for a, b in natural_ranges(size, num_chunks, 0, size) for i in range(a, b)]


def reorder(x: Tensor, dim: int, num_chunks: int, inverse: bool) -> Tensor:
    """Put a whole dim into zigzag order, or back into natural order."""
    order = list(chunk_order(num_chunks))
    if inverse:
        order = [order.index(i) for i in range(num_chunks)]
    chunks = x.chunk(num_chunks, dim)
    return torch.cat([chunks[i] for i in order], dim)


def to_order(x: Tensor, dims: tuple[int, ...], num_chunks: int, *, inverse: bool = False) -> Tensor:
    """Put some dims of a whole value into zigzag order, or back; see `reorder`."""
    for dim in dims:
        x = reorder(x, dim, num_chunks, inverse)
    return x


def causal_work(size: int, num_chunks: int, parts: int, *, window: int | None = None) -> list[int]:
    """Return, per rank, the number of (query, source) pairs that a causal mask lets it see.

    >>> causal_work(16, 4, 2)
    [68, 68]
    """
    local = size // parts
    return [
        sum(
            min(i + 1, window or size)
            for a, b in natural_ranges(size, num_chunks, rank * local, (rank + 1) * local)
            for i in range(a, b)
        )
        for rank in range(parts)
    ]
