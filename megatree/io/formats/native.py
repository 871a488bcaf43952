"""The native checkpoint as a format among the others: read by boxes, written in a stream."""

import os
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatree.io.checkpoint import Box, Leaf, Piece, StoredLeaf, read_manifest
from megatree.io.checkpoint.box import extents
from megatree.io.checkpoint.directory import sync
from megatree.io.checkpoint.extra import check_extra
from megatree.io.checkpoint.fetch import fetch
from megatree.io.checkpoint.listing import listing
from megatree.io.checkpoint.manifest import (
    BLOCK_BYTES,
    MANIFEST_FILE,
    Chunk,
    Manifest,
    blocks_of,
    encode,
    place,
    rank_file,
)
from megatree.io.checkpoint.place import Folder, PathLike, place_of
from megatree.io.checkpoint.reads import plan_reads
from megatree.io.formats.arrays import Array, grid


class NativeReader:
    """The arrays of a checkpoint by their paths, every block verified that is read.

    Args:
        path: one checkpoint, a directory or a URL.
    """

    def __init__(self, path: PathLike) -> None:
        self.place = place_of(path)
        self.manifest = read_manifest(path)
        self.leaves = {stored.leaf.path: stored.leaf for stored in self.manifest.leaves}
        self._alone = {
            stored.leaf.path: replace(self.manifest, leaves=(stored,))
            for stored in self.manifest.leaves
        }
        self.arrays = {
            path: Array(shape=leaf.shape, dtype=leaf.dtype) for path, leaf in self.leaves.items()
        }

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box.

        Raises:
            ValueError: they are damaged.
        """
        leaf = self.leaves[path]
        data = torch.empty(extents(box), dtype=leaf.dtype)
        target = Piece(
            path=path, shape=leaf.shape, dtype=leaf.dtype, axes=leaf.axes, box=box, data=data
        )
        manifest = self._alone[path]
        fetched = fetch(self.place, manifest, plan_reads(manifest, [target]), [target])
        if fetched.problems:
            fix = "Load another checkpoint, or restore these files from a copy."
            what = "the checkpoint is damaged"
            raise ValueError(listing(str(self.place), what, fetched.problems, fix))
        return data


class NativeWriter:
    """Writes a checkpoint box by box; the manifest, last, makes it one.

    Args:
        folder: empty.
        leaves: what it will hold.
        extra: training state.
        most_bytes: bytes of a box of the grid.
    """

    def __init__(
        self, folder: Path, leaves: Mapping[str, Leaf], extra: Mapping[str, Any], most_bytes: int
    ) -> None:
        check_extra(dict(extra), "extra")
        self.folder, self.leaves, self.extra = folder, leaves, extra
        parts = [
            (leaf, box)
            for _, leaf in sorted(leaves.items())
            for box in grid(Array(shape=leaf.shape, dtype=leaf.dtype), most_bytes)
        ]
        chunks = place(parts, rank_file(0))
        self._planned = {
            (leaf.path, chunk.box): chunk for (leaf, _), chunk in zip(parts, chunks, strict=True)
        }
        self._written: dict[str, list[Chunk]] = defaultdict(list)
        self.nbytes = chunks[-1].offset + chunks[-1].nbytes if chunks else 0
        if chunks:
            with open(folder / rank_file(0), "xb") as stream:
                stream.truncate(self.nbytes)

    def write(self, path: str, box: Box, data: Tensor) -> None:
        """Write the elements of a box of the grid."""
        chunk = self._planned.pop((path, box))
        raw = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert len(raw) == chunk.nbytes, f"{path}: {len(raw)} bytes for {chunk}"
        sums = tuple(zlib.crc32(raw[a:b]) for a, b in blocks_of(chunk.nbytes, BLOCK_BYTES))
        descriptor, at = os.open(self.folder / rank_file(0), os.O_WRONLY | os.O_NOFOLLOW), 0
        try:
            while at < len(raw):
                at += os.pwrite(descriptor, raw[at:], chunk.offset + at)
        finally:
            os.close(descriptor)
        self._written[path].append(replace(chunk, checksums=sums))

    def finish(self) -> None:
        """Wait for the disk, then write the manifest."""
        assert not self._planned, f"{len(self._planned)} boxes were not written"
        stored = tuple(
            StoredLeaf(leaf=leaf, chunks=tuple(sorted(self._written[path], key=lambda c: c.box)))
            for path, leaf in sorted(self.leaves.items())
        )
        files = {rank_file(0): self.nbytes} if self.nbytes else {}
        if files:
            sync(self.folder / rank_file(0))
        manifest = Manifest(
            leaves=stored, files=files, block_bytes=BLOCK_BYTES, extra=dict(self.extra)
        )
        Folder(self.folder).put(MANIFEST_FILE, encode(manifest))
