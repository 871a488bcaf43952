"""Writing one rank's chunk file: some blocks are checksummed while others are written."""

import os
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from torch import Tensor

from megatree.io.checkpoint.assign import Part
from megatree.io.checkpoint.box import Box, intersect, slices
from megatree.io.checkpoint.manifest import Chunk, blocks_of, place
from megatree.io.checkpoint.memory import gather_bytes, memory
from megatree.io.checkpoint.piece import Piece

# A core makes CRC-32 of 3.7 GB/s (measured, zlib of CPython 3.11), more than a disk takes.
NUM_THREADS = 4
BLOCKS_AHEAD = 8  # prepared and not yet written: bounds the memory of what had to be copied


def write_chunks(
    file: Path, parts: Sequence[Part], held: Sequence[Piece], block_bytes: int
) -> list[tuple[str, Chunk]]:
    """Write the parts into a new file, wait for the disk, and return (leaf path, chunk) of each.

    Raises:
        OSError: the file cannot be written.
    """
    chunks = place(parts, file.name)
    if not chunks:
        return []
    data = [_data(part, held) for part in parts]
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            checksums = _write_all(descriptor, chunks, data, block_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(
            f"{file}: cannot write its {chunks[-1].offset + chunks[-1].nbytes} bytes "
            f"({error.strerror}). Make room, or save to a directory that every rank sees and may "
            "write; earlier checkpoints are intact."
        ) from error
    return [
        (leaf.path, replace(chunk, checksums=tuple(sums)))
        for (leaf, _), chunk, sums in zip(parts, chunks, checksums, strict=True)
    ]


def _data(part: Part, held: Sequence[Piece]) -> Tensor:
    leaf, box = part
    for piece in held:
        if piece.path == leaf.path and intersect(box, piece.box) == box:
            return piece.tensor[slices(box, piece.box)]
    raise AssertionError(f"{leaf.path}: this rank was given a box that it does not hold")


def _write_all(
    descriptor: int, chunks: Sequence[Chunk], data: Sequence[Tensor], block_bytes: int
) -> list[list[int]]:
    """Write the blocks in the order of the file and return their checksums.

    One thread writes: on one file writes exclude each other, and more would only wait.
    """
    checksums: list[list[int]] = [[] for _ in chunks]
    jobs = (
        (index, chunk.offset + start, partial(_block, tensor, view, chunk.box, start, stop))
        for index, chunk, tensor in zip(range(len(chunks)), chunks, data, strict=True)
        for view in [memory(tensor)]
        for start, stop in blocks_of(chunk.nbytes, block_bytes)
    )
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        pending = deque((i, at, pool.submit(job)) for i, at, job in islice(jobs, BLOCKS_AHEAD))
        while pending:
            index, at, future = pending.popleft()
            block, checksum = future.result()
            pending.extend((i, a, pool.submit(job)) for i, a, job in islice(jobs, 1))
            checksums[index].append(checksum)
            _write_at(descriptor, block, at)
    return checksums


def _block(
    data: Tensor, view: memoryview | None, box: Box, start: int, stop: int
) -> tuple[memoryview, int]:
    """Return bytes `start` to `stop` of a chunk, copied only if need be, and their checksum."""
    size = data.dtype.itemsize
    if view is not None:
        block = view[start:stop]
    else:
        block = gather_bytes(data, box, start // size, stop // size)
    return block, zlib.crc32(block)


def _write_at(descriptor: int, block: memoryview, at: int) -> None:
    while block:
        written = os.pwrite(descriptor, block, at)
        block, at = block[written:], at + written
