"""Writing one rank's chunk file: blocks go from memory to the file while others are checksummed."""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatree.io.checkpoint.assign import Part
from megatree.io.checkpoint.box import intersect, slices
from megatree.io.checkpoint.manifest import Chunk, blocks_of, place
from megatree.io.checkpoint.memory import gather_bytes, memory
from megatree.io.checkpoint.piece import Piece

# A core makes CRC-32 of 3.7 GB/s (measured, zlib of CPython 3.11): two hide behind any disk, and
# two more keep writes in flight.
NUM_THREADS = 4


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
            assert piece.data is not None
            return piece.data[slices(box, piece.box)]
    raise AssertionError(f"{leaf.path}: this rank was given a box that it does not hold")


def _write_all(
    descriptor: int, chunks: Sequence[Chunk], data: Sequence[Tensor], block_bytes: int
) -> list[list[int]]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        pending: list[list[Future[int]]] = [
            [
                pool.submit(_write_block, descriptor, chunk, tensor, view, start, stop)
                for start, stop in blocks_of(chunk.nbytes, block_bytes)
            ]
            for chunk, tensor, view in zip(chunks, data, map(memory, data), strict=True)
        ]
        try:
            return [[block.result() for block in blocks] for blocks in pending]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_block(
    descriptor: int, chunk: Chunk, data: Tensor, view: memoryview | None, start: int, stop: int
) -> int:
    """Write bytes `start` to `stop` of a chunk and return their checksum."""
    itemsize = data.dtype.itemsize
    if view is None:
        block = gather_bytes(data, chunk.box, start // itemsize, stop // itemsize)
    else:
        block = view[start:stop]
    checksum, at = zlib.crc32(block), chunk.offset + start
    while block:
        written = os.pwrite(descriptor, block, at)
        block, at = block[written:], at + written
    return checksum
