"""Megatron's flat buffers: where the parameters of a rank lie in them, the last one first.

Its distributed optimizer keeps masters and moments of all parameters of a rank one after another,
in buckets. Every parameter begins at a multiple of 64 elements; embeddings that two stages share
have a bucket of their own.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, extents, runs, volume, whole

_ALIGNED = 64
# One read with what lies between is cheaper than many small ones, up to this factor.
_MOST_WASTE = 4


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a parameter lies.

    Args:
        name: of the parameter.
        shape: of it, on this rank.
        bucket: number of the bucket.
        start: first element in the bucket.
    """

    name: str
    shape: tuple[int, ...]
    bucket: int
    start: int


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """The parameters of a rank in a buffer.

    Args:
        slots: one for each.
        sizes: elements of each bucket, without what is added at its end.
    """

    slots: tuple[Slot, ...]
    sizes: tuple[int, ...]

    def at(self, slot: Slot) -> int:
        """Return the first element of a slot in buckets that follow one another."""
        return sum(self.sizes[: slot.bucket]) + slot.start


def lay_out(
    shapes: Mapping[str, tuple[int, ...]],
    apart: Collection[str] = (),
    *,
    bucket_size: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Buffer:
    """Return where parameters lie.

    Args:
        shapes: name -> shape on this rank, in the order in which the model has them.
        apart: names of those that have a bucket of their own.
        bucket_size: a bucket ends with the parameter that reaches it; None for one bucket.
        sizes: elements of the buckets, where they are known: a bucket ends where they say.

    >>> buffer = lay_out({"a": (10,), "b": (3, 2)})
    >>> [(slot.name, slot.start) for slot in buffer.slots], buffer.sizes
    ([('b', 0), ('a', 64)], (74,))
    """
    slots: list[Slot] = []
    done: list[int] = []
    at, held = 0, False
    for name, shape in reversed(list(shapes.items())):
        at = -(-at // _ALIGNED) * _ALIGNED
        if name in apart and held:
            done.append(at)
            at, held = 0, False
        slots.append(Slot(name=name, shape=shape, bucket=len(done), start=at))
        at, held = at + math.prod(shape), True
        full = bucket_size is not None and at >= bucket_size
        if sizes is not None:
            full = len(done) < len(sizes) and at == sizes[len(done)]
        if full or name in apart:
            done.append(at)
            at, held = 0, False
    if held:
        done.append(at)
    return Buffer(slots=tuple(slots), sizes=tuple(done))


def read_box(
    shape: tuple[int, ...], start: int, read: Callable[[int, int], Tensor], box: Box
) -> Tensor:
    """Return the elements of a box of an array that lies in a buffer from `start` on.

    Args:
        shape: of the array.
        start: its first element in the buffer.
        read: (first element, the one after the last) of the buffer -> elements.
        box: what is wanted.
    """
    parts = list(runs(box, whole(shape)))
    low, high = (parts[0][0], parts[-1][1]) if parts else (0, 0)
    if len(parts) > 1 and high - low <= _MOST_WASTE * volume(box):
        held = read(start + low, start + high)
        data = torch.cat([held[a - low : b - low] for a, b in parts])
    else:
        data = torch.cat([read(start + a, start + b) for a, b in parts] or [read(start, start)])
    return data.view(extents(box))
