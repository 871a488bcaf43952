"""A checkpoint directory appears whole, under its final name, or not at all."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from megatree.io.checkpoint.manifest import MANIFEST_FILE
from megatree.io.checkpoint.place import Folder, PathLike, Place, Remote, place_of
from megatree.io.world import World

_STEP = re.compile(r"step_([0-9]{8,})", re.ASCII)
_STAGING = re.compile(r"\..+\.[0-9a-f]{16}\.megatree-tmp", re.ASCII)


def step_name(step: int) -> str:
    """Return the name of the directory of a step.

    >>> step_name(20)
    'step_00000020'
    """
    return f"step_{step:08d}"


def steps_in(directory: PathLike) -> dict[int, Place]:
    """Return step -> checkpoint of all that are complete in a directory, by step.

    What a killed save left behind has another kind of name or no manifest and is not among them.
    """
    root = place_of(directory)
    named = {int(match[1]): name for name in root.names() if (match := _STEP.fullmatch(name))}
    found = {step: root / named[step] for step in sorted(named)}
    return {step: place for step, place in found.items() if place.holds(MANIFEST_FILE)}


def latest(directory: PathLike) -> Place | None:
    """Return the checkpoint of the largest step in a directory of checkpoints, or None.

    Ranks that ask at different moments of a save may get different answers: ask on one and
    broadcast.
    """
    root = place_of(directory)
    steps = [(int(match[1]), name) for name in root.names() if (match := _STEP.fullmatch(name))]
    for _, name in sorted(steps, reverse=True):
        if (root / name).holds(MANIFEST_FILE):
            return root / name
    return None


@contextmanager
def staged(final: Place, world: World) -> Generator[Place]:
    """Give all ranks a fresh directory; when the block ends, it is there as `final`.

    Everything in it must be safe by then, the manifest last. A folder is renamed. Behind a URL
    the manifest makes the checkpoint: without it the rest is nothing. If the block raises, what
    was written is removed; if the process dies, it stays until the next save here.

    Raises:
        ValueError: `final` exists.
        OSError: the directory cannot be made or renamed.
    """
    if isinstance(final, Remote):
        with _in_place(final, world):
            yield final
        return
    folder = Folder(final)
    opened = world.on_first(lambda: _open_staging(folder))
    staging = Folder(world.broadcast(str(opened[0]) if opened else ""))
    try:
        yield staging
        world.on_first(lambda: _publish(staging, folder))
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if opened:
            os.close(opened[1])


def discard(checkpoint: Place) -> None:
    """Remove a checkpoint: at any moment it is there whole, or not at all.

    Raises:
        OSError: it cannot be removed.
    """
    if isinstance(checkpoint, Remote):
        checkpoint.remove(MANIFEST_FILE)
        checkpoint.remove()
        return
    folder = Folder(checkpoint)
    if folder.is_symlink():
        folder.unlink()  # what it leads to is not ours
        return
    doomed = _staging_of(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


@contextmanager
def _in_place(final: Remote, world: World) -> Generator[None]:
    world.on_first(lambda: _clear(final))
    try:
        yield
    except BaseException:
        if world.rank == 0 and not final.holds(MANIFEST_FILE):
            final.remove()
        raise


def _clear(final: Remote) -> None:
    """Remove what a save without a manifest left."""
    _refuse_existing(final, final.holds(MANIFEST_FILE))
    final.remove()
    final.fs.makedirs(final.path, exist_ok=True)


def _open_staging(final: Folder) -> tuple[Folder, int]:
    """Make the staging directory; return it and the descriptor that holds its lock."""
    _refuse_existing(final, os.path.lexists(final))
    try:
        _make_directory(final.parent)
        _remove_stale(final.parent)
        staging = _staging_of(final)
        staging.mkdir()
    except OSError as error:
        raise OSError(
            f"{final}: the checkpoint cannot be made ({error.strerror}). Save to a directory that "
            "every rank sees and may write; earlier checkpoints are intact."
        ) from error
    descriptor = os.open(staging, os.O_RDONLY)
    _lock(descriptor)
    return staging, descriptor


def _staging_of(final: Folder) -> Folder:
    return final.parent / f".{final.name}.{secrets.token_hex(8)}.megatree-tmp"


def _publish(staging: Folder, final: Folder) -> None:
    sync(staging)
    _refuse_existing(final, os.path.lexists(final))
    os.rename(staging, final)
    sync(final.parent)


def _refuse_existing(final: Place, exists: bool) -> None:
    if exists:
        raise ValueError(
            f"{final}: this checkpoint exists already, and a save never replaces one. "
            "Remove it first, or save to another directory."
        )


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock that the kernel drops when the process ends; False if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: one job at a time saves there
    return True


def _remove_stale(parent: Path) -> None:
    """Remove staging directories whose save is dead; one that is being written holds its lock."""
    for name in os.listdir(parent):
        path = parent / name
        if not _STAGING.fullmatch(name) or path.is_symlink() or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if _lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
