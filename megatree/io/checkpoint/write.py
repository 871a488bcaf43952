"""Writing one rank's chunk file: blocks are checksummed while others are written."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

from torch import Tensor

from megatree.io.checkpoint.assign import Part
from megatree.io.checkpoint.box import Box, intersect, slices
from megatree.io.checkpoint.checksum import crc32
from megatree.io.checkpoint.manifest import Chunk, blocks_of, place
from megatree.io.checkpoint.memory import Scratch, copy_bytes, memory
from megatree.io.checkpoint.piece import Piece
from megatree.io.checkpoint.place import Place, Write

# A core writes 1.5 GB/s of new pages (tmpfs, measured), a disk less; the rest is checksums.
NUM_THREADS = min(4, len(os.sched_getaffinity(0)))
BLOCKS_AHEAD = 8  # handed to the threads and not yet written
_SPAN = 1 << 20  # bytes that are checksummed and moved on while a cache still has them


class Block(NamedTuple):
    """A block on its way to the file.

    Args:
        chunk: index of its chunk.
        at: its first byte in the file.
        lend: gives its bytes out, in any thread, until the context ends.
    """

    chunk: int
    at: int
    lend: Callable[[], AbstractContextManager[memoryview]]


Source: TypeAlias = Callable[[Sequence[Chunk]], Iterable[Block]]
"""Gives the blocks of chunks in the order of the file."""


def write_chunks(
    directory: Place,
    file: str,
    parts: Sequence[Part],
    source: Source,
    *,
    num_threads: int = NUM_THREADS,
) -> list[tuple[str, Chunk]]:
    """Write the parts into a new file, wait until it is safe, and return (leaf path, chunk) of
    each.

    Args:
        directory: where the file is made.
        file: its name.
        parts: what is written, in the order of the file.
        source: gives the bytes.
        num_threads: that make checksums, one of which writes at a time.

    Raises:
        OSError: the file cannot be written.
    """
    chunks = place(parts, file)
    if not chunks:
        return []
    checksums: list[list[int]] = [[] for _ in chunks]
    pending: deque[tuple[int, Future[int]]] = deque()

    def finish_oldest() -> None:
        index, checksum = pending.popleft()
        checksums[index].append(checksum.result())

    num_threads = 1 if directory.appends else num_threads  # one keeps their order
    try:
        with directory.writer(file) as write, ThreadPoolExecutor(num_threads) as pool:
            for block in source(chunks):
                pending.append((block.chunk, pool.submit(_write, block, write)))
                if len(pending) > BLOCKS_AHEAD:
                    finish_oldest()
            while pending:
                finish_oldest()
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


def _write(block: Block, write: Write) -> int:
    """Write a block and return its checksum."""
    checksum = 0
    with block.lend() as view:
        for start, stop in blocks_of(len(view), _SPAN):
            checksum = crc32(view[start:stop], checksum)
            write(view[start:stop], block.at + start)
    return checksum


def straight_from(parts: Sequence[Part], held: Sequence[Piece], block_bytes: int) -> Source:
    """Return the source that reads the pieces' own memory while it is written."""
    data = data_of(parts, held)

    def blocks(chunks: Sequence[Chunk]) -> Iterator[Block]:
        scratch = Scratch()
        for index, (chunk, tensor) in enumerate(zip(chunks, data, strict=True)):
            view = memory(tensor)
            for start, stop in blocks_of(chunk.nbytes, block_bytes):
                lend = partial(_lend, tensor, chunk.box, start, stop, view, scratch)
                yield Block(index, chunk.offset + start, lend)

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


@contextmanager
def _lend(
    data: Tensor, box: Box, start: int, stop: int, view: memoryview | None, scratch: Scratch
) -> Generator[memoryview]:
    """Give out bytes `start` to `stop` of a chunk, copied only if need be."""
    if view is not None:
        yield view[start:stop]
        return
    size = data.dtype.itemsize
    buffer = scratch.take(stop - start)
    copy_bytes(data, box, start // size, stop // size, buffer)
    yield buffer.numpy().data
    scratch.give_back(buffer)
