"""Saving: the ranks write the boxes they hold, each byte once, and rank 0 commits."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatree.io.checkpoint.assign import Part, assign
from megatree.io.checkpoint.directory import staged
from megatree.io.checkpoint.extra import check_extra, differing, fingerprints
from megatree.io.checkpoint.manifest import (
    ALIGNMENT,
    BLOCK_BYTES,
    MANIFEST_FILE,
    MOST_BLOCK_BYTES,
    Chunk,
    Manifest,
    StoredLeaf,
    encode,
    rank_file,
)
from megatree.io.checkpoint.piece import Leaf, Piece
from megatree.io.checkpoint.place import PathLike, Place, place_of
from megatree.io.checkpoint.write import NUM_THREADS, Source, straight_from, write_chunks
from megatree.io.world import World


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharing:
    """Who writes what: the same as long as no rank holds other boxes.

    Args:
        held: the parts that this rank has.
        share: those that it writes.
        declared: the leaves of all ranks.
    """

    held: list[Part]
    share: list[Part]
    declared: frozenset[Leaf]


@dataclass(frozen=True, kw_only=True, eq=False)
class SavePlan:
    """What all ranks save, and what of it this one writes.

    Args:
        final: the directory to make.
        held: this rank's pieces.
        sharing: the parts of them that it writes.
        extra: training state beside the arrays.
        block_bytes: bytes under one checksum.
    """

    final: Place
    held: list[Piece]
    sharing: Sharing
    extra: Mapping[str, Any]
    block_bytes: int

    @property
    def share(self) -> list[Part]:
        """The parts that this rank writes."""
        return self.sharing.share


def save(
    path: PathLike,
    pieces: Iterable[Piece],
    *,
    world: World,
    extra: Mapping[str, Any] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Write the global arrays that the pieces of all ranks make up, as the directory `path`.

    Law: `path` appears with everything in it on the disk, or not at all; other checkpoints beside
    it are not touched. The bytes written are a function of the arrays, the boxes and `extra`.
    Of data that is not contiguous in host memory, a few blocks at a time are copied there.

    Args:
        path: the directory to make, visible to all ranks, or its fsspec URL; see `step_name`.
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
    plan = plan_save(path, pieces, world=world, extra=extra, block_bytes=block_bytes)
    carry_out(plan, straight_from(plan.share, plan.held, block_bytes), world)


def plan_save(
    path: PathLike,
    pieces: Iterable[Piece],
    *,
    world: World,
    extra: Mapping[str, Any] | None = None,
    block_bytes: int = BLOCK_BYTES,
    before: Sharing | None = None,
) -> SavePlan:
    """Compare what the ranks hold and share the work; see `save`.

    Args:
        path, pieces, world, extra, block_bytes: as for `save`.
        before: the sharing of a save of the same world and `block_bytes`. Where every rank holds
            what it held then, it is taken again: to share the boxes of many ranks takes seconds.
    """
    final, state = place_of(path), dict(extra or {})
    held, prints = world.agree(lambda: _checked(pieces, state, block_bytes))
    parts = [(piece.leaf, piece.box) for piece in held]
    told = world.gather((before is not None and before.held == parts, prints))
    _refuse_differing([prints for _, prints in told], final)
    sharing = before if all(same for same, _ in told) else None
    return SavePlan(
        final=final,
        held=held,
        sharing=sharing or _shared(parts, final, world, block_bytes),
        extra=state,
        block_bytes=block_bytes,
    )


def _shared(parts: list[Part], final: Place, world: World, block_bytes: int) -> Sharing:
    told = world.gather(parts)
    shares = assign(told, str(final), block_bytes=block_bytes)
    declared = frozenset(leaf for parts_of_rank in told for leaf, _ in parts_of_rank)
    return Sharing(held=parts, share=shares[world.rank], declared=declared)


def carry_out(
    plan: SavePlan, source: Source, world: World, *, num_threads: int = NUM_THREADS
) -> None:
    """Write this rank's share as a source gives it, and commit when all ranks have; see `save`."""
    file = rank_file(world.rank)
    with staged(plan.final, world) as staging:
        chunks = world.agree(
            lambda: write_chunks(staging, file, plan.share, source, num_threads=num_threads)
        )
        written = [chunk for chunks_of_rank in world.gather(chunks) for chunk in chunks_of_rank]
        manifest = _manifest(plan.sharing.declared, written, plan.block_bytes, plan.extra)
        world.on_first(lambda: staging.put(MANIFEST_FILE, encode(manifest)))


def _checked(
    pieces: Iterable[Piece], extra: dict[str, Any], block_bytes: int
) -> tuple[list[Piece], dict[str, int]]:
    if not ALIGNMENT <= block_bytes <= MOST_BLOCK_BYTES or block_bytes % ALIGNMENT:
        raise ValueError(
            f"save: block_bytes is {block_bytes}. Give a positive multiple of {ALIGNMENT}, at most "
            f"{MOST_BLOCK_BYTES}."
        )
    check_extra(extra, "extra")
    held = list(pieces)
    for piece in held:
        _ = piece.tensor  # raises if there is none
    return held, fingerprints(extra)


def _refuse_differing(prints: Sequence[Mapping[str, int]], final: Place) -> None:
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
