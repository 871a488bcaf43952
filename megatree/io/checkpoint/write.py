"""Writing one rank's chunk file: some blocks are checksummed while others are written."""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

from torch import Tensor

from megatree.io.checkpoint.assign import Part
from megatree.io.checkpoint.box import Box, intersect, slices
from megatree.io.checkpoint.manifest import Chunk, blocks_of, place
from megatree.io.checkpoint.memory import Scratch, copy_bytes, memory
from megatree.io.checkpoint.piece import Piece
from megatree.io.checkpoint.place import Place

# A core makes CRC-32 of 3.7 GB/s (measured, zlib of CPython 3.11), more than a disk takes.
NUM_THREADS = 4
BLOCKS_AHEAD = 8  # prepared and not yet written: bounds the memory of what had to be copied


class Summed(NamedTuple):
    """The bytes of a block.

    Args:
        view: of them.
        crc32: their checksum.
        buffer: what they were copied to, if they were.
    """

    view: memoryview
    crc32: int
    buffer: Tensor | None


class Block(NamedTuple):
    """A block on its way to the file.

    Args:
        chunk: index of its chunk.
        at: its first byte in the file.
        ready: its bytes and their checksum.
    """

    chunk: int
    at: int
    ready: "Future[Summed]"


Source: TypeAlias = Callable[[Sequence[Chunk]], Iterable[Block]]
"""Gives the blocks of chunks in the order of the file; one is given up when the next is asked."""


def write_chunks(
    directory: Place, file: str, parts: Sequence[Part], source: Source
) -> list[tuple[str, Chunk]]:
    """Write the parts into a new file, wait until it is safe, and return (leaf path, chunk) of
    each.

    Raises:
        OSError: the file cannot be written.
    """
    chunks = place(parts, file)
    if not chunks:
        return []
    checksums: list[list[int]] = [[] for _ in chunks]
    try:
        # One thread writes: on one file writes exclude each other, and more would only wait.
        with directory.writer(file) as write:
            for index, at, ready in source(chunks):
                block = ready.result()
                checksums[index].append(block.crc32)
                write(block.view, at)
    except OSError as error:
        raise OSError(
            f"{directory / file}: cannot write its {chunks[-1].offset + chunks[-1].nbytes} bytes "
            f"({error.strerror or error}). Make room, or save to a directory that every rank sees "
            "and may write; earlier checkpoints are intact."
        ) from error
    return [
        (leaf.path, replace(chunk, checksums=tuple(sums)))
        for (leaf, _), chunk, sums in zip(parts, chunks, checksums, strict=True)
    ]


def straight_from(parts: Sequence[Part], held: Sequence[Piece], block_bytes: int) -> Source:
    """Return the source that reads the pieces' own memory while it is written."""
    data = data_of(parts, held)

    def blocks(chunks: Sequence[Chunk]) -> Iterator[Block]:
        scratch = Scratch()
        jobs = (
            (index, chunk.offset + start, partial(_block, tensor, chunk.box, start, stop), view)
            for index, chunk, tensor in zip(range(len(chunks)), chunks, data, strict=True)
            for view in [memory(tensor)]
            for start, stop in blocks_of(chunk.nbytes, block_bytes)
        )
        pending: deque[Block] = deque()
        with ThreadPoolExecutor(NUM_THREADS) as pool:

            def oldest() -> Iterator[Block]:
                block = pending.popleft()
                yield block
                if (buffer := block.ready.result().buffer) is not None:
                    scratch.give_back(buffer)

            for index, at, job, view in jobs:
                pending.append(Block(index, at, pool.submit(job, view, scratch)))
                if len(pending) > BLOCKS_AHEAD:
                    yield from oldest()
            while pending:
                yield from oldest()

    return blocks


def data_of(parts: Sequence[Part], held: Sequence[Piece]) -> list[Tensor]:
    """Return the elements of parts that this rank holds."""
    by_path: dict[str, list[Piece]] = {}
    for piece in held:
        by_path.setdefault(piece.path, []).append(piece)
    found = []
    for leaf, box in parts:
        piece = next(p for p in by_path[leaf.path] if intersect(box, p.box) == box)
        found.append(piece.tensor[slices(box, piece.box)])
    return found


def _block(
    data: Tensor, box: Box, start: int, stop: int, view: memoryview | None, scratch: Scratch
) -> Summed:
    """Return bytes `start` to `stop` of a chunk, copied only if need be, and their checksum."""
    if view is not None:
        return summed(view[start:stop], None)
    size = data.dtype.itemsize
    buffer = scratch.take(stop - start)
    copy_bytes(data, box, start // size, stop // size, buffer)
    return summed(buffer.numpy().data, buffer)


def summed(view: memoryview, buffer: Tensor | None) -> Summed:
    """Return bytes with their checksum."""
    return Summed(view, zlib.crc32(view), buffer)
