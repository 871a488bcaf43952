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
from megatree.io.world import World

_STEP = re.compile(r"step_([0-9]{8,})", re.ASCII)
_STAGING = re.compile(r"\..+\.[0-9a-f]{16}\.megatree-tmp", re.ASCII)


def step_name(step: int) -> str:
    """Return the name of the directory of a step.

    >>> step_name(20)
    'step_00000020'
    """
    return f"step_{step:08d}"


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint of the largest step in a directory of checkpoints, or None.

    What a killed save left behind has another kind of name and is never returned. Ranks that ask
    at different moments of a save may get different answers: ask on one and broadcast.
    """
    root = Path(directory)
    names = os.listdir(root) if root.is_dir() else []
    steps = sorted((int(match[1]), name) for name in names if (match := _STEP.fullmatch(name)))
    complete = [root / name for _, name in steps if (root / name / MANIFEST_FILE).is_file()]
    return complete[-1] if complete else None


@contextmanager
def staged(final: Path, world: World) -> Generator[Path]:
    """Give all ranks a fresh directory; when the block ends, rename it to `final`.

    Everything in it must be on the disk by then (see `write_file`). If the block raises, the
    directory is removed; if the process dies, it stays, unlocked, until the next save here.

    Raises:
        ValueError: `final` exists.
        OSError: the directory cannot be made or renamed.
    """
    opened = world.on_first(lambda: _open_staging(final))
    staging = Path(world.broadcast(str(opened[0]) if opened else ""))
    try:
        yield staging
        world.on_first(lambda: _publish(staging, final))
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if opened:
            os.close(opened[1])


def write_file(file: Path, raw: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(file, "xb") as stream:
        stream.write(raw)
        stream.flush()
        os.fsync(stream.fileno())


def _open_staging(final: Path) -> tuple[Path, int]:
    """Make the staging directory; return it and the descriptor that holds its lock."""
    _refuse_existing(final)
    _make_directory(final.parent)
    _remove_stale(final.parent)
    staging = final.parent / f".{final.name}.{secrets.token_hex(8)}.megatree-tmp"
    staging.mkdir()
    descriptor = os.open(staging, os.O_RDONLY)
    _lock(descriptor)
    return staging, descriptor


def _publish(staging: Path, final: Path) -> None:
    _sync_directory(staging)
    _refuse_existing(final)
    os.rename(staging, final)
    _sync_directory(final.parent)


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise ValueError(
            f"{final}: this checkpoint exists already, and a save never replaces one. "
            "Remove it first, or save to another directory."
        )


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
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
