"""Tensors of several tensor parallel ranks, put together along the dims that were cut."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from megatree.io.checkpoint.box import whole
from megatree.io.formats.archive import read_tensor
from megatree.io.formats.arrays import Array
from megatree.io.formats.tiles import Tile, Tiles


def merged(ranks: Sequence[Mapping[str, Tensor]], cut: Mapping[str, int], place: str) -> Tiles:
    """Return the whole tensors of ranks; those that are not cut are taken of the first.

    Args:
        ranks: per rank, name -> its part.
        cut: end of a name -> the dim that is cut.
        place: for errors.

    Raises:
        ValueError: ranks hold different tensors, or parts that do not fit.
    """
    arrays, tiles = {}, {}
    for rank, held in enumerate(ranks):
        odd = sorted(held.keys() ^ ranks[0].keys())
        if odd:
            raise ValueError(
                f"{place}: ranks 0 and {rank} do not hold the same tensors ({', '.join(odd[:8])}). "
                "Copy the files of all ranks anew."
            )
    for name, first in ranks[0].items():
        parts = [held[name] for held in ranks]
        dim = cut_dim(name, cut)
        if dim is None:
            parts = parts[:1]
        for rank, part in enumerate(parts):
            same = part.dtype == first.dtype and part.shape == first.shape
            if not isinstance(part, Tensor) or not same:
                raise ValueError(
                    f"{place}: {name} is {list(first.shape)} on rank 0, {list(part.shape)} on "
                    f"rank {rank}. Copy the files of all ranks anew."
                )
        size = list(first.shape)
        at = dim or 0
        if dim is not None:
            size[at] *= len(parts)
        arrays[name] = Array(shape=tuple(size), dtype=first.dtype)
        tiles[name] = [
            Tile(box=rank_box(tuple(size), dim, rank, len(ranks)), read=partial(read_tensor, part))
            for rank, part in enumerate(parts)
        ]
    return Tiles(arrays, tiles, place)


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
