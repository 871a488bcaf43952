"""Loading: any boxes, so any mesh, out of the chunks that overlap them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from megatree.io.checkpoint.box import extents
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.checkpoint.fetch import fetch
from megatree.io.checkpoint.listing import leaves, listing
from megatree.io.checkpoint.manifest import Manifest
from megatree.io.checkpoint.parse import read_manifest
from megatree.io.checkpoint.piece import Leaf, Piece
from megatree.io.checkpoint.place import Place, place_of
from megatree.io.checkpoint.reads import plan_reads
from megatree.io.world import World


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a load did.

    Args:
        pieces: the targets in their order, filled.
        missing: leaves some rank wants and the checkpoint lacks; their pieces are as they came.
        extra: leaves of the checkpoint that no rank wants.
        skipped: leaves left as they are because a pattern of `skip` says so.
        bytes_read: on this rank, whole blocks.
    """

    pieces: tuple[Piece, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_read: int


def load(
    path: str | os.PathLike[str],
    targets: Iterable[Piece],
    *,
    world: World,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    skip: Sequence[str] = (),
    subtree: str = "",
) -> Loaded:
    """Fill the targets of every rank from the checkpoint directory `path`.

    Law: the result does not depend on the boxes that were saved; a rank reads each block that
    holds an element it wants once, and verifies it. When it raises, targets may be half filled.

    Args:
        path: one checkpoint, for example what `latest` returns; a folder or an fsspec URL.
        targets: this rank's boxes; they may overlap, and memory is made where data is None.
        world: the processes that load together.
        allow_missing: glob patterns of paths that the checkpoint may lack, such as "opt.*".
        allow_extra: glob patterns of paths that it may have and no rank wants.
        skip: glob patterns of paths that are neither compared nor loaded.
        subtree: the place in the checkpoint where the targets' paths begin, "" for its root;
            leaves elsewhere are nobody's concern. Patterns are of paths below it.

    Raises:
        ValueError: on every rank, listing the leaves that are missing, not wanted, of another
            shape, dtype or axes, or damaged.
    """
    directory = place_of(path)
    wanted = world.agree(lambda: _checked(targets, allow_missing, allow_extra, skip))
    manifest = world.broadcast(world.on_first(lambda: _below(read_manifest(directory), subtree)))
    everywhere = {leaf for rank in world.gather({t.leaf for t in wanted}) for leaf in rank}
    declared = {leaf for leaf in everywhere if not _any(leaf.path, skip)}
    stored = {x.leaf.path: x.leaf for x in manifest.leaves if not _any(x.leaf.path, skip)}
    place = f"{directory}: {subtree}" if subtree else str(directory)
    missing, extra = _match(stored, declared, place, allow_missing, allow_extra)
    skipped = {t.path for t in everywhere} - {leaf.path for leaf in declared}
    left = {*missing, *skipped}
    pieces = tuple(
        replace(target, data=torch.empty(extents(target.box), dtype=target.dtype))
        if target.data is None and target.path not in left
        else target
        for target in wanted
    )
    filled = [piece for piece in pieces if piece.path not in left]
    nbytes = world.agree(lambda: _fetch(directory, manifest, filled))
    return Loaded(
        pieces=pieces,
        missing=missing,
        extra=extra,
        skipped=tuple(sorted(skipped)),
        bytes_read=nbytes,
    )


def _below(manifest: Manifest, subtree: str) -> Manifest:
    """Return the manifest of a sub-tree, as if it were a whole one."""
    if not subtree:
        return manifest
    start = f"{subtree}."
    leaves = tuple(
        replace(x, leaf=replace(x.leaf, path=x.leaf.path.removeprefix(start)))
        for x in manifest.leaves
        if x.leaf.path.startswith(start)
    )
    return replace(manifest, leaves=leaves)


def load_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `extra` that was saved with the checkpoint directory `path`."""
    return dict(read_manifest(path).extra)


def _checked(targets: Iterable[Piece], *patterns: Sequence[str]) -> list[Piece]:
    for allowed in patterns:
        if isinstance(allowed, str):
            raise ValueError(
                f"load: the patterns are the string '{allowed}'. Give a tuple of them."
            )
    return list(targets)


def _match(
    stored: Mapping[str, Leaf],
    declared: Iterable[Leaf],
    place: str,
    allow_missing: Sequence[str],
    allow_extra: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare what is wanted with what is stored; return the missing and the extra paths."""
    paths = {leaf.path for leaf in declared}
    missing, extra = sorted(paths - stored.keys()), sorted(stored.keys() - paths)
    refused = {path: "not in the checkpoint" for path in missing if not _any(path, allow_missing)}
    refused |= {
        path: "in the checkpoint, wanted by no rank"
        for path in extra
        if not _any(path, allow_extra)
    }
    fix = "Build the target from the config that was saved with the checkpoint"
    if refused:
        fix += ", or name in allow_missing= and allow_extra= what may differ"
    for leaf in declared:
        if leaf.path in stored and leaf != stored[leaf.path]:
            refused[leaf.path] = _difference(stored[leaf.path], leaf)
    if refused:
        what = leaves(len(refused), "does not match the target", "do not match the target")
        problems = [f"{path}: {refused[path]}" for path in sorted(refused)]
        raise ValueError(listing(place, what, problems, fix + "."))
    return tuple(missing), tuple(extra)


def _any(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _difference(stored: Leaf, target: Leaf) -> str:
    pairs = (
        ("shape", stored.shape, target.shape),
        ("dtype", dtype_name(stored.dtype), dtype_name(target.dtype)),
        ("axes", f"'{stored.axes}'", f"'{target.axes}'"),
    )
    return ", ".join(
        f"{what} {one} in the checkpoint, {two} in the target"
        for what, one, two in pairs
        if one != two
    )


def _fetch(directory: Place, manifest: Manifest, targets: Sequence[Piece]) -> int:
    fetched = fetch(directory, manifest, plan_reads(manifest, targets), targets)
    if fetched.problems:
        raise ValueError(
            listing(
                str(directory),
                "the checkpoint is damaged",
                fetched.problems,
                "Load another checkpoint, or restore these files from a copy.",
            )
        )
    return fetched.nbytes
