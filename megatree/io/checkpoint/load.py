"""Loading: any boxes, so any mesh, out of the chunks that overlap them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from megatree.io.checkpoint.box import extents
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.checkpoint.fetch import fetch
from megatree.io.checkpoint.listing import leaves, listing
from megatree.io.checkpoint.manifest import Manifest
from megatree.io.checkpoint.parse import read_manifest
from megatree.io.checkpoint.piece import Leaf, Piece
from megatree.io.checkpoint.reads import plan_reads
from megatree.io.world import World


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a load did.

    Args:
        pieces: the targets in their order, filled.
        missing: leaves some rank wants and the checkpoint lacks; their pieces are as they came.
        extra: leaves of the checkpoint that no rank wants.
        bytes_read: on this rank, whole blocks.
    """

    pieces: tuple[Piece, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    bytes_read: int


def load(
    path: str | os.PathLike[str],
    targets: Iterable[Piece],
    *,
    world: World,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
) -> Loaded:
    """Fill the targets of every rank from the checkpoint directory `path`.

    Law: the result does not depend on the boxes that were saved; a rank reads each block that
    holds an element it wants once, and verifies it. When it raises, targets may be half filled.

    Args:
        path: one checkpoint, for example what `latest` returns.
        targets: this rank's boxes; they may overlap, and memory is made where data is None.
        world: the processes that load together.
        allow_missing: glob patterns of paths that the checkpoint may lack, such as "opt.*".
        allow_extra: glob patterns of paths that it may have and no rank wants.

    Raises:
        ValueError: on every rank, listing the leaves that are missing, not wanted, of another
            shape, dtype or axes, or damaged.
    """
    directory = Path(path)
    wanted = world.agree(lambda: _checked(targets, allow_missing, allow_extra))
    manifest: Manifest = world.broadcast(world.on_first(lambda: read_manifest(directory)))
    declared = {leaf for rank in world.gather({t.leaf for t in wanted}) for leaf in rank}
    missing, extra = _match(manifest, declared, directory, allow_missing, allow_extra)
    pieces = tuple(
        replace(target, data=torch.empty(extents(target.box), dtype=target.dtype))
        if target.data is None and target.path not in missing
        else target
        for target in wanted
    )
    nbytes = world.agree(lambda: _fetch(directory, manifest, pieces))
    return Loaded(pieces=pieces, missing=missing, extra=extra, bytes_read=nbytes)


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
    manifest: Manifest,
    declared: Iterable[Leaf],
    directory: Path,
    allow_missing: Sequence[str],
    allow_extra: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare what is wanted with what is stored; return the missing and the extra paths."""
    stored = {entry.leaf.path: entry.leaf for entry in manifest.leaves}
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
        raise ValueError(listing(str(directory), what, problems, fix + "."))
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


def _fetch(directory: Path, manifest: Manifest, targets: Sequence[Piece]) -> int:
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
