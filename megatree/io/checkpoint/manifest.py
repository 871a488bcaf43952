"""What a checkpoint holds and where: the manifest as a value, and its bytes (format version 1)."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import pack
from typing import Any

from megatree.io.checkpoint.box import Box, spelled
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.checkpoint.extra import packed
from megatree.io.checkpoint.piece import Leaf

FORMAT = "megatree-checkpoint"
VERSION = 1
ALIGNMENT = 64  # bytes: a chunk starts on a cache line, so any dtype can be viewed in place
BLOCK_BYTES = 4 << 20  # bytes under one checksum: a part of a chunk is verified without the rest
MOST_BLOCK_BYTES = 1 << 30  # a reader holds a block in memory: a manifest may not ask for more
MANIFEST_FILE = "manifest.msgpack"


def rank_file(rank: int) -> str:
    """Return the name of the file a rank writes.

    >>> rank_file(3)
    'rank_00003.bin'
    """
    return f"rank_{rank:05d}.bin"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Where the elements of one box are: row-major, little-endian, contiguous.

    Args:
        box: the part of the leaf, global coordinates.
        file: name of the file, in the directory of the manifest.
        offset: bytes from the start of the file, a multiple of ALIGNMENT.
        nbytes: bytes of the box.
        checksums: CRC-32 (zlib) of each block of `block_bytes`, the last one may be shorter.
    """

    box: Box
    file: str
    offset: int
    nbytes: int
    checksums: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{spelled(self.box)} {self.file} {self.offset}+{self.nbytes}"


@dataclass(frozen=True, kw_only=True)
class StoredLeaf:
    """A leaf and the chunks that cover it, each element once."""

    leaf: Leaf
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint.

    Args:
        leaves: in order of their paths.
        files: name -> bytes of every chunk file.
        block_bytes: bytes under one checksum.
        extra: the training state beside the arrays, as given to `save`.
    """

    leaves: tuple[StoredLeaf, ...]
    files: Mapping[str, int]
    block_bytes: int
    extra: Mapping[str, Any]


def blocks_of(nbytes: int, block_bytes: int) -> list[tuple[int, int]]:
    """Return the (start, stop) bytes of each block of a chunk.

    >>> blocks_of(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [(at, min(at + block_bytes, nbytes)) for at in range(0, nbytes, block_bytes)]


def place(parts: Sequence[tuple[Leaf, Box]], file: str) -> list[Chunk]:
    """Lay boxes out in one file, in the given order, each aligned."""
    chunks, end = [], 0
    for leaf, box in parts:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + leaf.box_nbytes(box)
        chunks.append(Chunk(box=box, file=file, offset=offset, nbytes=end - offset))
    return chunks


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of the manifest file: the same bytes for the same value."""
    files = sorted(manifest.files)
    body = packed(
        {
            "block_bytes": manifest.block_bytes,
            "files": [{"name": name, "nbytes": manifest.files[name]} for name in files],
            "leaves": [_encode_leaf(stored, files) for stored in manifest.leaves],
            "extra": manifest.extra,
        }
    )
    return packed({"format": FORMAT, "version": VERSION, "crc32": zlib.crc32(body), "body": body})


def _encode_leaf(stored: StoredLeaf, files: Sequence[str]) -> dict[str, Any]:
    leaf, index = stored.leaf, {name: position for position, name in enumerate(files)}
    return {
        "path": leaf.path,
        "shape": list(leaf.shape),
        "dtype": dtype_name(leaf.dtype),
        "axes": leaf.axes,
        "chunks": [
            {
                "box": [list(edge) for edge in chunk.box],
                "file": index[chunk.file],
                "offset": chunk.offset,
                "nbytes": chunk.nbytes,
                "crc32": pack(f"<{len(chunk.checksums)}I", *chunk.checksums),
            }
            for chunk in stored.chunks
        ],
    }
