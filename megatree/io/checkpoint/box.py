"""Boxes: rectangular regions of a global array, and their algebra.

A box is (start, stop) per dim in global coordinates; the box of a 0-d array is `()`, one element.
"Elements a to b of a box" counts in row-major order.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod
from typing import TypeAlias

Box: TypeAlias = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """Return the box of a whole array."""
    return tuple((0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    """Return the shape of the region.

    >>> extents(((2, 5), (0, 4)))
    (3, 4)
    """
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Return the number of elements."""
    return prod(extents(box))


def spelled(box: Box) -> str:
    """Write a box as a user indexes it.

    >>> spelled(((2, 5), (0, 4)))
    '[2:5, 0:4]'
    """
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def intersect(a: Box, b: Box) -> Box | None:
    """Return the common region, or None if it has no element.

    >>> intersect(((0, 3), (0, 4)), ((2, 5), (1, 2)))
    ((2, 3), (1, 2))
    """
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def slices(box: Box, within: Box) -> tuple[slice, ...]:
    """Index `box` in an array that holds `within`.

    >>> slices(((2, 3), (1, 2)), ((2, 5), (0, 4)))
    (slice(0, 1, None), slice(1, 2, None))
    """
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, within, strict=True)
    )


def first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Return two boxes that share an element (all have some), or None.

    Boxes that a plane separates are looked at apart, so that a grid of n takes n log n.
    """
    pending = [list(boxes)]
    while pending:
        group = pending.pop()
        if len(group) < 2:
            continue
        parts = max((_separated(group, dim) for dim in range(len(group[0]))), key=len, default=[])
        if len(parts) > 1:
            pending += parts
        elif (found := _overlap_by_pairs(group)) is not None:
            return found
    return None


def _separated(boxes: Sequence[Box], dim: int) -> list[list[Box]]:
    """Return the boxes in groups with planes across `dim` between them."""
    groups: list[list[Box]] = []
    end = None
    for box in sorted(boxes, key=lambda b: b[dim]):
        start, stop = box[dim]
        if end is None or start >= end:
            groups.append([])
        groups[-1].append(box)
        end = stop if end is None else max(end, stop)
    return groups


def _overlap_by_pairs(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Return two boxes that share an element, or None; a sweep along the dim most finely cut."""
    if not boxes[0]:
        return boxes[0], boxes[1]
    dim = max(range(len(boxes[0])), key=lambda d: len({box[d] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda b: b[dim]):
        open_boxes = [other for other in open_boxes if other[dim][1] > box[dim][0]]
        for other in open_boxes:
            if all(a < d and c < b for (a, b), (c, d) in zip(other, box, strict=True)):
                return other, box
        open_boxes.append(box)
    return None


def first_gap(box: Box, covers: Sequence[Box]) -> Box | None:
    """Return a region of `box` in none of `covers`, or None.

    The box is halved at their edges until each half is in one of them, or in none.
    """
    pending = [(box, [c for cover in covers if (c := intersect(cover, box)) is not None])]
    while pending:
        region, inside = pending.pop()
        if not volume(region) or region in inside:
            continue
        if not inside:
            return region
        edges = [
            sorted({at for cover in inside for at in cover[dim]} - {*region[dim]})
            for dim in range(len(region))
        ]
        dim = max(range(len(edges)), key=lambda d: len(edges[d]))
        middle = edges[dim][len(edges[dim]) // 2]
        start, stop = region[dim]
        for edge in ((middle, stop), (start, middle)):
            half = (*region[:dim], edge, *region[dim + 1 :])
            clipped = [c for cover in inside if (c := intersect(cover, half)) is not None]
            pending.append((half, clipped))
    return None


def split(box: Box, parts: int) -> list[Box]:
    """Cut a box into at most `parts` boxes of nearly equal size, outermost dims first.

    Outermost first, so that a part is as few byte runs as possible.

    >>> split(((0, 5), (0, 4)), 2)
    [((0, 2), (0, 4)), ((2, 5), (0, 4))]
    """
    dim = next((d for d, size in enumerate(extents(box)) if size > 1), None)
    if dim is None or parts < 2:
        return [box]
    start, stop = box[dim]
    pieces = min(parts, stop - start)
    edges = [start + (stop - start) * k // pieces for k in range(pieces + 1)]
    return [
        part
        for edge in pairwise(edges)
        for part in split((*box[:dim], edge, *box[dim + 1 :]), parts // pieces)
    ]


def runs(box: Box, within: Box) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) elements of `within` that `box` occupies, as few runs as possible.

    >>> list(runs(((0, 2), (1, 3)), ((0, 2), (0, 4))))
    [(1, 3), (5, 7)]
    """
    sizes, inner = extents(within), len(within)
    while inner and box[inner - 1] == within[inner - 1]:
        inner -= 1
    cut = max(inner - 1, 0)  # the innermost dim that is cut: a run is a range of it
    strides = [prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    offsets = [start - origin for (start, _), (origin, _) in zip(box, within, strict=True)]
    length = prod(extents(box)[cut:])
    outer = (
        range(offset, offset + size) for offset, size in zip(offsets, extents(box), strict=True)
    )
    first = offsets[cut] * strides[cut] if box else 0
    for index in product(*list(outer)[:cut]):
        start = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        yield start, start + length


def elements(box: Box, start: int, stop: int) -> list[Box]:
    """Return boxes that hold elements `start` to `stop` of `box`, in order.

    >>> elements(((0, 3), (0, 4)), 2, 8)
    [((0, 1), (2, 4)), ((1, 2), (0, 4))]
    """
    if start >= stop:
        return []
    if not box:
        return [box]
    (low, _), inner = box[0], box[1:]
    row = volume(inner)
    first, last = start // row, (stop - 1) // row
    if start == first * row and stop == (last + 1) * row:
        return [((low + first, low + last + 1), *inner)]
    if first == last:
        at = (low + first, low + first + 1)
        return [(at, *part) for part in elements(inner, start - first * row, stop - first * row)]
    head, tail = -(-start // row) * row, stop // row * row
    return [
        *elements(box, start, head),
        *elements(box, head, tail),
        *elements(box, tail, stop),
    ]
