"""Which bytes of a checkpoint a rank reads for the boxes it wants: a plan, made of values."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatree.io.checkpoint.box import Box, elements, intersect, spelled
from megatree.io.checkpoint.manifest import Chunk, Manifest, StoredLeaf, blocks_of
from megatree.io.checkpoint.piece import Piece


@dataclass(frozen=True, kw_only=True)
class Want:
    """A box of a chunk and the index of the target that it goes to."""

    target: int
    box: Box


@dataclass(frozen=True, kw_only=True)
class Read:
    """A chunk, and everything that this rank wants of it: it is read once for all targets."""

    path: str
    itemsize: int
    chunk: Chunk
    wants: tuple[Want, ...]

    def __str__(self) -> str:
        wants = ", ".join(f"{spelled(want.box)} to target {want.target}" for want in self.wants)
        return f"{self.path} {self.chunk}: {wants}"

    def blocks(self, block_bytes: int) -> list[tuple[int, int]]:
        """Return the (start, stop) bytes of the blocks that hold a wanted element."""
        blocks = blocks_of(self.chunk.nbytes, block_bytes)
        if any(want.box == self.chunk.box for want in self.wants):
            return blocks
        return [block for block in blocks if self._touches(*block)]

    def _touches(self, start: int, stop: int) -> bool:
        regions = elements(self.chunk.box, start // self.itemsize, stop // self.itemsize)
        return any(
            intersect(region, want.box) is not None for region in regions for want in self.wants
        )


def plan_reads(manifest: Manifest, targets: Sequence[Piece]) -> list[Read]:
    """Return the reads that fill the targets, in the order of the files.

    Law: each element of each target is in one want, and each chunk in at most one read.
    Targets of leaves that the manifest lacks get nothing.
    """
    by_path: dict[str, list[int]] = {}
    for index, target in enumerate(targets):
        by_path.setdefault(target.path, []).append(index)
    reads = [
        read
        for stored in manifest.leaves
        for read in _reads(stored, [(i, targets[i].box) for i in by_path.get(stored.leaf.path, [])])
    ]
    return sorted(reads, key=lambda read: (read.chunk.file, read.chunk.offset))


def _reads(stored: StoredLeaf, targets: Sequence[tuple[int, Box]]) -> list[Read]:
    reads = []
    for chunk in stored.chunks if targets else ():
        common = [(index, intersect(chunk.box, box)) for index, box in targets]
        wants = tuple(Want(target=i, box=box) for i, box in common if box is not None)
        if wants:
            leaf = stored.leaf
            reads.append(
                Read(path=leaf.path, itemsize=leaf.dtype.itemsize, chunk=chunk, wants=wants)
            )
    return reads
