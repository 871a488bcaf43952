"""Arrays seen through other arrays whose dims are made of the same axes: merged, split, permuted.

A side of the map says of every dim which ranges of axes it is made of, outermost first. Boxes of
one side are looked up on the other: that is all there is to fused projections, permuted heads,
layers that are stacked here and apart there, and padding.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, elements, extents, volume
from megatree.io.formats.arrays import Array, Reader

Span = tuple[str, int, int]
Ranges = dict[str, tuple[int, int]]

# Reading a bounding box and dropping what is not wanted beats many small reads, up to this factor.
MOST_WASTE = 4


@dataclass(frozen=True, kw_only=True)
class Side:
    """What the dims of an array are made of.

    Args:
        dims: per dim, ranges of axes (axis, start, stop), outermost first.
        within: ranges that the array lies in and has no dim of.
    """

    dims: tuple[tuple[Span, ...], ...]
    within: tuple[Span, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(math.prod(b - a for _, a, b in group) for group in self.dims)

    @property
    def ranges(self) -> Ranges:
        """Axis -> the range of it that the array has."""
        return {axis: (a, b) for group in (*self.dims, self.within) for axis, a, b in group}


@dataclass(frozen=True, kw_only=True)
class Part:
    """An array of the other format that holds elements of this one."""

    path: str
    side: Side


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An array as parts of others; elements that no part holds are padding, and zero."""

    array: Array
    side: Side
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A reader of arrays that are parts of another reader's.

    Args:
        source: the other reader.
        entries: path -> where its elements are.
    """

    source: Reader
    entries: Mapping[str, Entry]

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        """What there is."""
        return {path: entry.array for path, entry in self.entries.items()}

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box."""
        entry = self.entries[path]
        out = torch.zeros(extents(box), dtype=entry.array.dtype)
        for region, where in _regions(entry.side, box):
            for part in entry.parts:
                common = _intersect(region, part.side.ranges)
                if common is not None:
                    _place(out, entry.side, region, where, part, common, self.source)
        return out


def _regions(side: Side, box: Box) -> Iterator[tuple[Ranges, Box]]:
    """Cut a box into ranges of axes; yield each with its place in the box."""
    per_dim = []
    for group, (start, stop) in zip(side.dims, box, strict=True):
        at, found = 0, []
        for local in elements(tuple((0, b - a) for _, a, b in group), start, stop):
            found.append((local, (at, at + volume(local))))
            at += volume(local)
        per_dim.append(found)
    for choice in product(*per_dim):
        ranges: Ranges = {axis: (a, b) for axis, a, b in side.within}
        for group, (local, _) in zip(side.dims, choice, strict=True):
            for (axis, first, _), (low, high) in zip(group, local, strict=True):
                ranges[axis] = (first + low, first + high)
        yield ranges, tuple(place for _, place in choice)


def _intersect(one: Ranges, other: Ranges) -> Ranges | None:
    """Return what two sides have in common; an axis that one does not name has one index."""
    out = {**one, **other}
    for axis in one.keys() ^ other.keys():
        assert out[axis][1] - out[axis][0] == 1, f"{axis}: {sorted(one)} against {sorted(other)}"
    for axis in one.keys() & other.keys():
        out[axis] = (max(one[axis][0], other[axis][0]), min(one[axis][1], other[axis][1]))
    return out if all(a < b for a, b in out.values()) else None


def _place(
    out: Tensor,
    side: Side,
    region: Ranges,
    where: Box,
    part: Part,
    common: Ranges,
    source: Reader,
) -> None:
    view = out[tuple(slice(*edge) for edge in where)]
    names = []
    for group in side.dims:
        sizes = [region[axis][1] - region[axis][0] for axis, _, _ in group]
        view = view.unflatten(len(names), sizes)
        names += [axis for axis, _, _ in group]
    for piece in _thrifty(part.side, common):
        values = _read(part, piece, lambda box: source.read(part.path, box))
        own = [axis for group in part.side.dims for axis, _, _ in group]
        lacking = [axis for axis in names if axis not in own]
        values = values.reshape([*values.shape, *[1] * len(lacking)])
        own += lacking
        order = [own.index(axis) for axis in names]
        lost = [dim for dim in range(len(own)) if dim not in order]
        moved = values.permute([*order, *lost]).reshape([values.shape[dim] for dim in order])
        target = view
        for dim, axis in enumerate(names):
            start, stop = piece[axis]
            target = target.narrow(dim, start - region[axis][0], stop - start)
        target.copy_(moved)


def _thrifty(side: Side, wanted: Ranges) -> Iterator[Ranges]:
    """Cut ranges so that no read brings more than MOST_WASTE times what is wanted."""
    for group in side.dims:
        low, high, count = _bounds(group, wanted)
        outer = next((axis for axis, _, _ in group if wanted[axis][1] - wanted[axis][0] > 1), None)
        if outer is not None and high - low > MOST_WASTE * count:
            for at in range(*wanted[outer]):
                yield from _thrifty(side, {**wanted, outer: (at, at + 1)})
            return
    yield wanted


def _bounds(group: Sequence[Span], wanted: Ranges) -> tuple[int, int, int]:
    """Return the rows from first to last that hold the wanted ranges, and how many are wanted."""
    low, high, count = 0, 0, 1
    for axis, start, stop in group:
        a, b = wanted[axis]
        low, high = low * (stop - start) + a - start, high * (stop - start) + b - 1 - start
        count *= b - a
    return low, high + 1, count


def _read(part: Part, wanted: Ranges, read: Callable[[Box], Tensor]) -> Tensor:
    """Return the wanted ranges of a part, a dim for every axis of its dims."""
    bounds = [_bounds(group, wanted) for group in part.side.dims]
    data = read(tuple((low, high) for low, high, _ in bounds))
    for dim, (group, (low, high, count)) in enumerate(zip(part.side.dims, bounds, strict=True)):
        if high - low != count:
            data = data.index_select(dim, _rows(group, wanted) - low)
    sizes = [wanted[axis][1] - wanted[axis][0] for group in part.side.dims for axis, _, _ in group]
    return data.reshape(sizes)


def _rows(group: Sequence[Span], wanted: Ranges) -> Tensor:
    rows = torch.zeros(1, dtype=torch.int64)
    for axis, start, stop in group:
        inner = torch.arange(wanted[axis][0] - start, wanted[axis][1] - start)
        rows = (rows[:, None] * (stop - start) + inner).reshape(-1)
    return rows
