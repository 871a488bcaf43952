"""Saving: the ranks write the boxes they hold, each byte once, and rank 0 commits."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatree.io.checkpoint.assign import assign
from megatree.io.checkpoint.directory import staged, write_file
from megatree.io.checkpoint.extra import check_extra, differing, fingerprints
from megatree.io.checkpoint.manifest import (
    ALIGNMENT,
    BLOCK_BYTES,
    MANIFEST_FILE,
    Chunk,
    Manifest,
    StoredLeaf,
    encode,
    rank_file,
)
from megatree.io.checkpoint.piece import Leaf, Piece
from megatree.io.checkpoint.write import write_chunks
from megatree.io.world import World


def save(
    path: str | os.PathLike[str],
    pieces: Iterable[Piece],
    *,
    world: World,
    extra: Mapping[str, Any] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Write the global arrays that the pieces of all ranks make up, as the directory `path`.

    Law: `path` appears with everything in it on the disk, or not at all; other checkpoints beside
    it are not touched. The bytes written are a function of the arrays, the boxes and `extra`.

    Args:
        path: the directory to make, visible to all ranks; see `step_name`.
        pieces: this rank's boxes. Equal boxes on several ranks are replicas (their values are
            trusted to be equal) and are written once, by shares; others must be disjoint and
            cover their leaf.
        world: the processes that save together.
        extra: training state beside the arrays (step, config, data position), the same on every
            rank; see `check_extra` for what it may hold.
        block_bytes: bytes under one checksum, a multiple of 64.

    Raises:
        ValueError: on every rank, if the pieces of any rank are wrong or `path` exists.
        OSError: on every rank, if any cannot write.
    """
    final, state = Path(path), dict(extra or {})
    held, prints = world.agree(lambda: _checked(pieces, state, block_bytes))
    told = world.gather(([(piece.leaf, piece.box) for piece in held], prints))
    _refuse_differing([prints for _, prints in told], final)
    shares = assign([parts for parts, _ in told], str(final), block_bytes=block_bytes)
    declared = {leaf for parts, _ in told for leaf, _ in parts}
    with staged(final, world) as staging:
        file, share = staging / rank_file(world.rank), shares[world.rank]
        chunks = world.agree(lambda: write_chunks(file, share, held, block_bytes))
        written = [chunk for chunks_of_rank in world.gather(chunks) for chunk in chunks_of_rank]
        manifest = _manifest(declared, written, block_bytes, state)
        world.on_first(lambda: write_file(staging / MANIFEST_FILE, encode(manifest)))


def _checked(
    pieces: Iterable[Piece], extra: dict[str, Any], block_bytes: int
) -> tuple[list[Piece], dict[str, int]]:
    if block_bytes < ALIGNMENT or block_bytes % ALIGNMENT:
        raise ValueError(
            f"save: block_bytes is {block_bytes}. Give a positive multiple of {ALIGNMENT}."
        )
    check_extra(extra, "extra")
    held = list(pieces)
    for piece in held:
        _ = piece.tensor  # raises if there is none
    return held, fingerprints(extra)


def _refuse_differing(prints: Sequence[Mapping[str, int]], final: Path) -> None:
    keys = differing(prints)
    if keys:
        raise ValueError(
            f"{final}: extra is not the same on every rank, it differs in {', '.join(keys)}. "
            "Give what the whole job shares; arrays that differ by rank are pieces."
        )


def _manifest(
    declared: Iterable[Leaf],
    written: Sequence[tuple[str, Chunk]],
    block_bytes: int,
    extra: Mapping[str, Any],
) -> Manifest:
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    files: dict[str, int] = {}
    for path, chunk in written:
        chunks[path].append(chunk)
        files[chunk.file] = max(chunk.offset + chunk.nbytes, files.get(chunk.file, 0))
    leaves = tuple(
        StoredLeaf(leaf=leaf, chunks=tuple(sorted(chunks[leaf.path], key=lambda c: c.box)))
        for leaf in sorted(declared, key=lambda leaf: leaf.path)
    )
    return Manifest(leaves=leaves, files=files, block_bytes=block_bytes, extra=extra)
