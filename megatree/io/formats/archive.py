"""Archives of torch.save: read lazily with weights_only, made with room for what is written later.

Never more than plain data comes out of a pickle: names that it may use are listed, those of
Megatron, numpy and argparse stand for inert records, and any other is refused.
"""

import io
import os
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatree.io.checkpoint.box import Box
from megatree.io.formats.arrays import Array
from megatree.io.formats.raw import Region

_FIX = "Take another copy, or one from who you trust."
_INERT = ("argparse", "numpy", "megatron", "transformer_engine", "apex", "enum", "signal", "types")


class Inert:
    """What a pickle wanted to make of a class that is not loaded: its state, and no behaviour."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """Make one, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load(source: Path | bytes, place: str) -> Any:
    """Return what an archive holds; tensors of a file are mapped, not read.

    Raises:
        ValueError: it is no archive of torch, holds what expands, or names what is not allowed.
    """
    stream: io.BufferedIOBase
    stream = open(source, "rb") if isinstance(source, Path) else io.BytesIO(source)  # noqa: SIM115
    with stream:
        _check_archive(stream, place)
        stream.seek(0)
        unknown = _globals(stream, place)
        stream.seek(0)
        with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
            try:
                if isinstance(source, Path):
                    return torch.load(source, weights_only=True, mmap=True, map_location="cpu")
                return torch.load(stream, weights_only=True, map_location="cpu")
            except Exception as error:
                first = str(error).strip().partition("\n")[0]
                raise ValueError(f"{place}: cannot be loaded ({first}). {_FIX}") from None


class _Window(io.RawIOBase):
    """A range of a file as a file of its own."""

    def __init__(self, stream: io.BufferedReader, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._at)
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = self._stream.readinto(view)
        self._at += count
        return count


def locate(file: Path, offset: int, length: int, place: str) -> Region | None:
    """Find the tensor in an archive that is a range of a file; its elements are not read.

    Args:
        file: has the archive.
        offset, length: where.
        place: for errors.

    Returns:
        Where its elements are, or None if they are not in one row-major piece.

    Raises:
        ValueError: it is no archive of a tensor, or lies about its size.
    """
    with open(file, "rb") as whole:
        stream = io.BufferedReader(_Window(whole, offset, length))
        _check_archive(stream, place)
        stream.seek(0)
        if _globals(stream, place):
            raise ValueError(f"{place}: holds more than a tensor. {_FIX}")
        stream.seek(0)
        entries = _entries(stream)
        stream.seek(0)
        try:
            with FakeTensorMode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of typed storages, which torch makes itself
                tensor = torch.load(stream, weights_only=True, map_location="cpu")  # pyrefly: ignore
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"{place}: cannot be loaded ({first}). {_FIX}") from None
        if not isinstance(tensor, Tensor) or tensor.is_sparse:
            raise ValueError(f"{place}: holds no tensor. {_FIX}")
        if not tensor.is_contiguous():
            return None
        storage = tensor.untyped_storage()
        array = Array(shape=tuple(tensor.shape), dtype=tensor.dtype)
        first = int(storage._checkpoint_offset or 0)  # pyrefly: ignore
        skipped = int(tensor.storage_offset()) * tensor.dtype.itemsize
        there = entries.get(first, 0)
        if array.nbytes and (there != storage.nbytes() or there < skipped + array.nbytes):
            raise ValueError(
                f"{place}: says its storage has {storage.nbytes()} bytes and {array} ends at "
                f"{skipped + array.nbytes}, the entry has {there}. {_FIX}"
            )
        return Region(file=file, offset=offset + first + skipped, array=array)


def _check_archive(stream: io.BufferedIOBase, place: str) -> None:
    """Refuse an archive whose entries are packed or larger than the file."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError):
        raise ValueError(
            f"{place}: no archive of torch (of 1.6 or later). Load it with a torch that you trust "
            "it with, and save it anew."
        ) from None
    total = 0
    for entry in entries:
        parts = entry.filename.split("/")
        if entry.filename.startswith("/") or ".." in parts:
            raise ValueError(f"{place}: has an entry {entry.filename!r}, a way out. {_FIX}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(
                f"{place}: its entry {entry.filename!r} expands from {entry.compress_size} to "
                f"{entry.file_size} bytes, and torch packs nothing. {_FIX}"
            )
        total += entry.file_size
    if total > size:
        raise ValueError(f"{place}: its entries say {total} bytes, it has {size}. {_FIX}")


def _globals(stream: io.BufferedIOBase, place: str) -> list[str]:
    """Return the names that the pickle uses and that become inert records."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(stream)  # pyrefly: ignore
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{place}: its pickle cannot be read ({first}). {_FIX}") from None
    for name in names:
        if name.partition(".")[0] not in _INERT:
            raise ValueError(f"{place}: its pickle asks for {name}, which is no data. {_FIX}")
    return names


def plain(value: Any) -> Any:
    """Return argparse.Namespace and other records as dicts, numpy and torch scalars as they are."""
    if isinstance(value, Inert):
        return {key: plain(item) for key, item in vars(value).items() if key != "args"}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if type(value) is list else value


def read_tensor(tensor: Tensor, box: Box) -> Tensor:
    """Return the elements of a box of a mapped tensor, copied."""
    return tensor.detach()[tuple(slice(*edge) for edge in box)].clone()


def create(file: Path, tree: Mapping[Any, Any]) -> dict[str, Region]:
    """Make an archive of a tree; its `Array`s become tensors that are written afterwards.

    Args:
        file: to make.
        tree: dicts of Arrays and plain values.

    Returns:
        Path in the tree, joined by "/" -> where the tensor goes.
    """
    placed: dict[str, Array] = {}
    with FakeTensorMode():
        made = _with_tensors(tree, "", placed)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(made, file)
    offsets = _offsets(file)
    return {
        path: Region(file=file, offset=offsets[index], array=array)
        for index, (path, array) in enumerate(placed.items())
        if array.nbytes
    }


def _with_tensors(tree: Any, path: str, placed: dict[str, Array]) -> Any:
    if isinstance(tree, Array):
        placed[path] = tree
        return torch.empty(tree.shape, dtype=tree.dtype)
    if type(tree) is dict:
        return {
            key: _with_tensors(item, f"{path}/{key}" if path else str(key), placed)
            for key, item in tree.items()
        }
    return tree


def _offsets(file: Path) -> dict[int, int]:
    """Return the first byte of each storage, by its number (they are numbered as pickled)."""
    out = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
        for entry in archive.infolist():
            folder, _, number = entry.filename.rpartition("/")
            if folder.endswith("/data") and number.isdigit():
                out[int(number)] = _first_byte(stream, entry)
    return out


def _entries(stream: io.BufferedIOBase) -> dict[int, int]:
    """Return the first byte of each entry of an archive -> its bytes."""
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
    return {_first_byte(stream, entry): entry.file_size for entry in entries}


def _first_byte(stream: io.BufferedIOBase, entry: zipfile.ZipInfo) -> int:
    stream.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    return entry.header_offset + 30 + name + extra
