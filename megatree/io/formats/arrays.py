"""The protocol of every format: named global arrays, read and written by boxes."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatree.io.checkpoint import Box, Piece
from megatree.io.checkpoint.dtypes import dtype_name

BOX_BYTES = 32 << 20
"""Bytes of the boxes in which arrays are carried over: what a conversion holds, a few times."""
AHEAD = 4
"""Boxes that are being read, or wait to be written, at once."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """A named array of a format.

    Args:
        shape: elements per dim, of the whole array.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"


@runtime_checkable
class Reader(Protocol):
    """Arrays that can be read."""

    @property
    def arrays(self) -> Mapping[str, Array]:
        """What there is, by path."""
        ...

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box; the caller does not write into them."""
        ...


@runtime_checkable
class Writer(Protocol):
    """Arrays that are being written; which ones there will be is said when it is made."""

    def write(self, path: str, box: Box, data: Tensor) -> None:
        """Write the elements of a box of the grid (see `grid`), each box once."""
        ...

    def finish(self) -> None:
        """Write what comes last, when all boxes are written, and wait for the disk."""
        ...


def box_shape(array: Array, most_bytes: int = BOX_BYTES) -> tuple[int, ...]:
    """Return the shape of the boxes in which an array is carried over: rows of whole inner dims.

    >>> box_shape(Array(shape=(4, 6, 8), dtype=torch.float32), most_bytes=70)
    (1, 2, 8)
    """
    shape = list(array.shape)
    for dim in range(len(shape)):
        inner = math.prod(shape[dim + 1 :]) * array.dtype.itemsize
        if inner <= most_bytes or dim == len(shape) - 1:
            shape[dim] = min(shape[dim], max(1, most_bytes // max(1, inner)))
            break
        shape[dim] = min(1, shape[dim])
    return tuple(shape)


def grid(array: Array, most_bytes: int = BOX_BYTES) -> Iterator[Box]:
    """Yield the boxes in which an array is carried over; none if it has no element."""
    steps = box_shape(array, most_bytes)
    if 0 in array.shape:
        return
    ranges = [
        [(at, min(at + step, size)) for at in range(0, size, step)]
        for size, step in zip(array.shape, steps, strict=True)
    ]
    yield from product(*ranges)


def read_ahead(
    reader: Reader, places: Iterable[tuple[str, Box]], ahead: int = AHEAD
) -> Iterator[tuple[str, Box, Tensor]]:
    """Yield boxes of a reader in order, while the next ones are being read.

    Args:
        reader: reads from several threads at once, as all of ours do.
        places: path and box of each.
        ahead: boxes that are held or being read at once.
    """
    waiting: deque[tuple[str, Box, Future[Tensor]]] = deque()
    pool = ThreadPoolExecutor(max_workers=ahead)
    try:
        for path, box in places:
            if len(waiting) == ahead:
                first, where, future = waiting.popleft()
                yield first, where, future.result()
                del future
            waiting.append((path, box, pool.submit(reader.read, path, box)))
        while waiting:
            first, where, future = waiting.popleft()
            yield first, where, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def boxes_of(reader: Reader, most_bytes: int = BOX_BYTES) -> Iterator[tuple[str, Box]]:
    """Yield every array of a reader in the boxes in which it is carried over."""
    for path, array in reader.arrays.items():
        for box in grid(array, most_bytes):
            yield path, box


def copy(
    reader: Reader,
    writer: Writer,
    *,
    most_bytes: int = BOX_BYTES,
    told: Callable[[str, int], None] = lambda path, nbytes: None,
) -> None:
    """Carry all arrays of a reader over to a writer, a few boxes at a time.

    Args:
        reader: has the arrays that the writer was made for.
        writer: takes them.
        most_bytes: bytes of a box.
        told: called after each box with the path and the bytes of the box.
    """
    for path, box, data in read_ahead(reader, boxes_of(reader, most_bytes)):
        writer.write(path, box, data)
        told(path, data.numel() * data.element_size())
    writer.finish()


@torch.no_grad()
def fill(reader: Reader, pieces: Sequence[Piece]) -> None:
    """Fill the pieces of one rank: what a mesh holds, from any format.

    Raises:
        ValueError: an array is missing, or of another shape.
    """
    wanted = []
    for piece in pieces:
        array = reader.arrays.get(piece.path)
        if array is None or array.shape != piece.shape:
            found = "missing" if array is None else f"of shape {list(array.shape)}"
            raise ValueError(
                f"{piece.path}: {found}, the model has {list(piece.shape)}. "
                "Build the model from the config that comes with the weights."
            )
        if all(start < stop for start, stop in piece.box):
            wanted.append(piece)
    places = [(piece.path, piece.box) for piece in wanted]
    for piece, (_, _, data) in zip(wanted, read_ahead(reader, places), strict=True):
        piece.tensor.copy_(data)
