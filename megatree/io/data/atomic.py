"""A file appears whole under its final name, or not at all, however the process ends."""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_STAGING = re.compile(r"\.(.+)\.[0-9a-f]{16}\.megatree-tmp", re.ASCII)


class StagedFile:
    """A file under a temporary name beside its final one, locked while it is open.

    `commit` puts it on the disk under the final name; `discard` removes it. What a killed process
    left is unlocked, and the next `StagedFile` for the same name removes it.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        self.path = final.with_name(f".{final.name}.{secrets.token_hex(8)}.megatree-tmp")
        self.file: BinaryIO = open(self.path, "xb", buffering=1 << 20)  # noqa: SIM115
        # Where locks do not work, nothing is swept up: `_sweep` needs the lock as well.
        with suppress(OSError):
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self.file.write(data)

    def sync(self) -> None:
        """Wait until all bytes are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def commit(self) -> None:
        """Wait for the disk, then take the final name (whatever had it is replaced)."""
        self.sync()
        os.replace(self.path, self.final)
        self.file.close()
        sync_directory(self.final.parent)

    def discard(self) -> None:
        """Remove the file, unless it was committed."""
        if not self.file.closed:
            self.path.unlink(missing_ok=True)
            self.file.close()


@contextmanager
def atomic_write(final: Path) -> Iterator[StagedFile]:
    """Give a staged file; commit it when the block ends, discard it if the block raises."""
    staged = StagedFile(final)
    try:
        yield staged
        staged.commit()
    finally:
        staged.discard()


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(final: Path) -> None:
    """Remove what killed writers of this name left; a living one holds a lock."""
    for name in os.listdir(final.parent):
        match = _STAGING.fullmatch(name)
        if not (match and match[1] == final.name):
            continue
        path = final.with_name(name)
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except OSError:  # locked, gone, or locks do not work here
            continue
