"""Open a file as a stream of bytes, compressed or not, and say when it is cut."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatree.io.optional import optional

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


class Source:
    """A readable stream that knows how far it is in the file on disk.

    Attributes:
        path: the file.
        size: bytes on disk.
    """

    def __init__(self, path: Path, raw: BinaryIO, stream: Any) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._raw = raw
        self._stream = stream

    def read(self, num_bytes: int) -> bytes:
        """Return up to `num_bytes` uncompressed bytes; none at the end.

        Raises:
            ValueError: if the compressed data is cut or damaged.
        """
        try:
            return self._stream.read(num_bytes)
        except EOFError as error:
            raise ValueError(
                f"{self.path}: the compressed data ends too early, after {self.size} bytes on "
                "disk. Fetch the file again."
            ) from error
        except (zlib.error, lzma.LZMAError, gzip.BadGzipFile, _zstd_error(self.path)) as error:
            raise ValueError(
                f"{self.path}: it is not what its suffix says, or damaged: {error}. "
                "Rename it, or fetch it again."
            ) from error
        except OSError as error:  # bz2 has no error class of its own
            if error.errno is not None:
                raise
            raise ValueError(
                f"{self.path}: it is not what its suffix says, or damaged: {error}. "
                "Rename it, or fetch it again."
            ) from error

    @property
    def position(self) -> int:
        """Bytes read of the file on disk."""
        return self._raw.tell()


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Give the uncompressed bytes of a file; .gz, .zst, .bz2 and .xz are decompressed on the way.

    Raises:
        ValueError: if there is no such file, or reading .zst needs a package.
    """
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{path}: {error.strerror}. Name files that exist.") from error
    with raw, _decompressed(path, raw) as stream:
        yield Source(path, raw, stream)


@contextmanager
def compressed_writer(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    """Give a stream that compresses into `raw` as the suffix of `path` says."""
    match path.suffix:
        case ".gz":
            # Without a name and a time in it, the same content is the same file.
            with gzip.GzipFile("", "wb", fileobj=raw, compresslevel=6, mtime=0) as stream:
                yield cast(BinaryIO, stream)
        case ".zst":
            with zstd(path).ZstdFile(raw, "wb") as stream:
                yield stream
        case ".bz2":
            with bz2.BZ2File(raw, "wb") as stream:
                yield cast(BinaryIO, stream)
        case ".xz":
            with lzma.LZMAFile(raw, "wb") as stream:
                yield cast(BinaryIO, stream)
        case _:
            yield raw


def plain_suffix(path: Path) -> str:
    """Return the suffix of a name below its compression.

    >>> plain_suffix(Path("a.jsonl.gz"))
    '.jsonl'
    """
    return path.with_suffix("").suffix if path.suffix in SUFFIXES else path.suffix


def zstd(path: Path) -> Any:
    """Return the module that reads and writes .zst: Python's own from 3.14 on.

    Raises:
        ValueError: if it is not installed.
    """
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return optional(name, extra="data", purpose=str(path))


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    match path.suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=raw, mode="rb")
        case ".zst":
            # Its reader, unlike others, does not take a cut file for a whole one.
            return zstd(path).ZstdFile(raw, "rb")
        case ".bz2":
            return bz2.BZ2File(raw, "rb")
        case ".xz":
            return lzma.LZMAFile(raw, "rb")
        case _:
            return raw


def _zstd_error(path: Path) -> type[Exception]:
    return zstd(path).ZstdError if path.suffix == ".zst" else zlib.error
