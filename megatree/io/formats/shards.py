"""Tensors of several tensor parallel ranks, put together along the dims that were cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megatree.io.checkpoint.box import Box, whole
from megatree.io.formats.archive import read_tensor
from megatree.io.formats.arrays import Array
from megatree.io.formats.compare import gap
from megatree.io.formats.tiles import Tile, Tiles

_FIX = "Copy the files of all ranks anew."


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank has of a tensor.

    Args:
        array: its shape there, and dtype.
        read: box of it -> elements.
    """

    array: Array
    read: Callable[[Box], Tensor]


def part_of(tensor: Tensor) -> Part:
    """Return a (mapped) tensor as a part."""
    array = Array(shape=tuple(tensor.shape), dtype=tensor.dtype)
    return Part(array=array, read=partial(read_tensor, tensor))


def merged(ranks: Sequence[Mapping[str, Part]], cut: Mapping[str, int], place: str) -> Tiles:
    """Return the whole tensors of ranks; those that are not cut must be the same on all of them.

    Args:
        ranks: per rank, name -> its part.
        cut: end of a name -> the dim that is cut.
        place: for errors.

    Raises:
        ValueError: ranks hold different tensors, parts that do not fit, or other copies.
    """
    arrays, tiles = {}, {}
    for rank, held in enumerate(ranks):
        odd = sorted(held.keys() ^ ranks[0].keys())
        if odd:
            raise ValueError(
                f"{place}: ranks 0 and {rank} do not hold the same tensors ({', '.join(odd[:8])}). "
                f"{_FIX}"
            )
    for name, first in ranks[0].items():
        parts = [held[name] for held in ranks]
        dim = cut_dim(name, cut)
        for rank, part in enumerate(parts):
            if part.array != first.array:
                raise ValueError(
                    f"{place}: {name} is {first.array} on rank 0, {part.array} on rank {rank}. "
                    f"{_FIX}"
                )
            if dim is None and rank:
                require_copy(first, part, f"{place}: {name} on rank {rank}", "rank 0", _FIX)
        if dim is None:
            parts = parts[:1]
        size = list(first.array.shape)
        at = dim or 0
        if dim is not None:
            size[at] *= len(parts)
        arrays[name] = Array(shape=tuple(size), dtype=first.array.dtype)
        tiles[name] = [
            Tile(box=rank_box(tuple(size), dim, rank, len(ranks)), read=part.read)
            for rank, part in enumerate(parts)
        ]
    return Tiles(arrays, tiles, place)


def require_copy(first: Part, second: Part, which: str, other: str, fix: str) -> None:
    """Refuse two tensors that should be copies and are not, bit for bit.

    Raises:
        ValueError: saying how many elements differ, and by how much.
    """
    if first.array != second.array:
        found = f"is {second.array}, and {other} is {first.array}"
    else:
        apart = gap(first.array, first.read, second.read)
        if not apart.count:
            return
        found = f"{apart}, compared with {other}"
    raise ValueError(f"{which}: {found}. {fix}")


def cut_dim(name: str, cut: Mapping[str, int]) -> int | None:
    """Return the dim of a tensor that ranks cut."""
    return next((dim for end, dim in cut.items() if f".{name}".endswith(f".{end}")), None)


def rank_box(
    shape: tuple[int, ...], dim: int | None, rank: int, size: int
) -> tuple[tuple[int, int], ...]:
    """Return the part of a tensor that a rank has."""
    box = list(whole(shape))
    if dim is not None:
        step = shape[dim] // size
        box[dim] = (rank * step, (rank + 1) * step)
    return tuple(box)
