"""Arrays that lie in tiles: the parts that ranks wrote, seen as the whole array again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatree.io.checkpoint.box import (
    Box,
    extents,
    first_gap,
    first_overlap,
    intersect,
    slices,
    spelled,
    volume,
    whole,
)
from megatree.io.formats.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of an array.

    Args:
        box: which part.
        read: box of the tile, from its own origin -> elements.
    """

    box: Box
    read: Callable[[Box], Tensor]


class Tiles:
    """A reader of arrays that lie in tiles.

    Args:
        arrays: path -> the whole array.
        tiles: path -> its tiles.
        place: for errors.

    Raises:
        ValueError: tiles overlap, leave a gap, or are not inside the array.
    """

    def __init__(
        self, arrays: Mapping[str, Array], tiles: Mapping[str, Sequence[Tile]], place: str
    ) -> None:
        self.arrays, self.tiles = arrays, tiles
        for path, array in arrays.items():
            _check(array, [tile.box for tile in tiles[path]], f"{place}: {path}")

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box."""
        out = torch.empty(extents(box), dtype=self.arrays[path].dtype)
        for tile in self.tiles[path]:
            common = intersect(tile.box, box)
            if common is not None:
                local = tuple(
                    (a - origin, b - origin)
                    for (a, b), (origin, _) in zip(common, tile.box, strict=True)
                )
                if common == box:
                    return tile.read(local)
                out[slices(common, box)] = tile.read(local)
        return out


def _check(array: Array, boxes: Sequence[Box], place: str) -> None:
    fix = "The checkpoint is damaged: take another copy."
    for box in boxes:
        inside = len(box) == len(array.shape) and all(
            0 <= start <= stop <= size for (start, stop), size in zip(box, array.shape, strict=True)
        )
        if not inside:
            raise ValueError(
                f"{place}: the part {spelled(box)} is not inside {list(array.shape)}. {fix}"
            )
    filled = [box for box in boxes if volume(box)]
    overlap = first_overlap(filled)
    if overlap:
        one, two = map(spelled, overlap)
        raise ValueError(f"{place}: the parts {one} and {two} overlap. {fix}")
    covered, total = sum(map(volume, filled)), volume(whole(array.shape))
    if covered != total:
        gap = spelled(first_gap(whole(array.shape), filled) or ())
        raise ValueError(
            f"{place}: its parts hold {covered} of {total} elements, none holds {gap}. {fix}"
        )
