"""A directory of files: of this machine, or behind an fsspec URL."""

import os
import stat
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import PosixPath
from typing import Any, TypeAlias

from megatree.io.optional import optional

PathLike: TypeAlias = str | os.PathLike[str]

Write: TypeAlias = Callable[[memoryview, int], None]
"""Writes bytes at an offset of a new file, in any thread; gaps between offsets are zeros. Where a
place `appends`, the offsets grow."""

Read: TypeAlias = Callable[[memoryview, int], int]
"""Fills memory from an offset of a file; returns the bytes read, fewer only where it ends."""


class Unreadable(Exception):  # noqa: N818 (it says what the file is)
    """Why a file cannot be read as a whole, to follow its name: "is missing".

    Args:
        wrong: that text.
        end: bytes that it does have, if that is what is wrong.
    """

    def __init__(self, wrong: str, end: int | None = None) -> None:
        super().__init__(wrong)
        self.end = end


def place_of(path: PathLike) -> "Folder | Remote":
    """Return the directory of a path or of an fsspec URL, which has "://" in it.

    Raises:
        ValueError: nothing installed reaches such a URL.
    """
    text = os.fspath(path)
    return Remote.at(text) if "://" in text else Folder(text)


class Folder(PosixPath):
    """A directory of this machine, or of a file system mounted on it."""

    appends = False

    def names(self) -> list[str]:
        """Return what is in it, nothing if there is no such directory."""
        return sorted(os.listdir(self)) if self.is_dir() else []

    def holds(self, file: str) -> bool:
        """Whether it has a file of this name."""
        return (self / file).is_file()

    def size(self, file: str) -> int:
        """Return the bytes of a file.

        Raises:
            Unreadable: it is not there, or no regular file.
        """
        try:
            status = os.lstat(self / file)
        except FileNotFoundError:
            raise Unreadable("is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("is not a regular file")
        return status.st_size

    @contextmanager
    def reader(self, file: str, nbytes: int) -> Generator[Read]:
        """Open a file to read from in any order, in several threads.

        Raises:
            Unreadable: it is no regular file of so many bytes.
        """
        found = self.size(file)
        if not os.access(self / file, os.R_OK):
            raise Unreadable("may not be read by this user")
        if found != nbytes:
            raise Unreadable(f"has {found} bytes, the manifest says {nbytes}", found)
        descriptor = os.open(self / file, os.O_RDONLY | os.O_NOFOLLOW)

        def read(view: memoryview, offset: int) -> int:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return done

        try:
            yield read
        finally:
            os.close(descriptor)

    @contextmanager
    def writer(self, file: str) -> Generator[Write]:
        """Make a file, and when the block ends wait until it is safe."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(self / file, flags, 0o666)

        # The kernel lets one thread at a time write to a file; others would spin, not sleep.
        turn = threading.Lock()

        def write(block: memoryview, at: int) -> None:
            while block:
                with turn:
                    written = os.pwrite(descriptor, block, at)
                block, at = block[written:], at + written

        try:
            yield write
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def put(self, file: str, raw: bytes) -> None:
        """Make a small file, whole, and wait until it is safe."""
        with open(self / file, "xb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())

    def get(self, file: str) -> bytes:
        """Return a small file.

        Raises:
            Unreadable: it is not there, or no regular file.
        """
        self.size(file)  # refuses links, and pipes that would never end
        descriptor = os.open(self / file, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as stream:
            return stream.read()


class Remote:
    """A directory behind an fsspec URL, where a file appears when it is closed; see `Folder`.

    Args:
        fs: the fsspec file system.
        path: of the directory in it.
        url: of the directory.
    """

    appends = True

    def __init__(self, fs: Any, path: str, url: str) -> None:
        self.fs, self.path, self.url = fs, path.rstrip("/"), url.rstrip("/")

    @classmethod
    def at(cls, url: str) -> "Remote":
        """Return the directory of a URL."""
        fsspec = optional("fsspec", extra="remote", purpose=url)
        try:
            fs, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{url}: fsspec cannot open it ({error}). Install what it names, or use a folder."
            ) from error
        return cls(fs, path, url)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    def __fspath__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.fs, f"{self.path}/{name}", f"{self.url}/{name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def _in(self, file: str) -> str:
        return f"{self.path}/{file}"

    def names(self) -> list[str]:
        """Return what is in it."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in found})

    def holds(self, file: str) -> bool:
        """Whether it has a file of this name."""
        with suppress(Unreadable):
            return self.size(file) >= 0
        return False

    def size(self, file: str) -> int:
        """Return the bytes of a file."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.info(self._in(file))
        except FileNotFoundError:
            raise Unreadable("is missing") from None
        if found["type"] != "file":
            raise Unreadable("is not a regular file")
        return found["size"]

    @contextmanager
    def reader(self, file: str, nbytes: int) -> Generator[Read]:
        """Read by ranges."""
        found = self.size(file)
        if found != nbytes:
            raise Unreadable(f"has {found} bytes, the manifest says {nbytes}", found)

        def read(view: memoryview, offset: int) -> int:
            got = self.fs.cat_file(self._in(file), start=offset, end=offset + len(view))
            view[: len(got)] = got
            return len(got)

        yield read

    @contextmanager
    def writer(self, file: str) -> Generator[Write]:
        """Make a file."""
        at = 0

        def write(block: memoryview, offset: int) -> None:
            nonlocal at
            stream.write(bytes(offset - at))
            stream.write(block)
            at = offset + len(block)

        stream = self.fs.open(self._in(file), "wb")
        try:
            yield write
        except BaseException:
            with suppress(Exception):
                stream.discard()  # whatever was sent is no file
            raise
        stream.close()

    def put(self, file: str, raw: bytes) -> None:
        """Make a small file."""
        self.fs.pipe_file(self._in(file), raw)
        self.fs.invalidate_cache()

    def get(self, file: str) -> bytes:
        """Return a small file."""
        self.size(file)
        return self.fs.cat_file(self._in(file))

    def remove(self, file: str = "") -> None:
        """Remove a file, or the whole directory; what is not there is no error."""
        with suppress(FileNotFoundError):
            self.fs.rm(self._in(file) if file else self.path, recursive=not file)
        self.fs.invalidate_cache()


Place: TypeAlias = Folder | Remote
"""A directory; `str` of it is its path or URL."""
