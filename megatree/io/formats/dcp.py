"""torch.distributed.checkpoint: read without its pickles' powers, written as it reads them.

The one place besides `runtime` that names torch.distributed: the classes of its metadata file,
which a checkpoint that torch can load has to hold.
"""

import io
import os
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, extents
from megatree.io.checkpoint.directory import sync
from megatree.io.checkpoint.dtypes import DTYPES
from megatree.io.formats import archive
from megatree.io.formats.arrays import Array
from megatree.io.formats.names import checked_file
from megatree.io.formats.raw import Region, read_region
from megatree.io.formats.tiles import Tile, Tiles

METADATA = ".metadata"
_FIX = "The checkpoint is damaged or hostile: take another copy."
_MODULES = ("torch.distributed.checkpoint.", "torch.serialization", "megatron.core.")


class DcpReader:
    """The tensors of a checkpoint; `blobs` are what it keeps beside them, pickled.

    Args:
        folder: has .metadata and the files that it names.

    Raises:
        ValueError: the metadata asks for what is no data, or contradicts itself or the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = str(checked_file(folder, METADATA, place=str(folder)))
        told = _read_metadata(folder / METADATA)
        self._regions: dict[tuple[str, int], Region] = {}
        self._lock = Lock()
        self._files: dict[str, Path] = {}
        stored: dict[str, dict[tuple[int, ...] | None, Any]] = defaultdict(dict)
        for index, info in told.storage_data.items():
            offset = getattr(index, "offset", None)
            stored[index.fqn][None if offset is None else tuple(offset)] = info
        arrays, tiles = {}, {}
        self.blobs: dict[str, tuple[Path, int, int]] = {}
        for path, entry in told.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                info = stored[path].get(None)
                if info is not None:
                    self.blobs[path] = self._where(info, path)
                continue
            dtype = getattr(getattr(entry, "properties", None), "dtype", None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{self.place}: {path} has no dtype. {_FIX}")
            arrays[path] = Array(shape=_sizes(entry.size, self.place), dtype=dtype)
            tiles[path] = [self._tile(path, chunk, dtype, stored[path]) for chunk in entry.chunks]
        self._tiles = Tiles(arrays, tiles, self.place)
        self.arrays = arrays

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box."""
        return self._tiles.read(path, box)

    def boxes(self, path: str) -> list[Box]:
        """Return the parts in which an array is stored."""
        return [tile.box for tile in self._tiles.tiles[path]]

    def blob(self, path: str) -> Any:
        """Return a value that is no tensor, classes as inert records."""
        return archive.plain(archive.load(self._bytes(*self.blobs[path]), f"{self.place}: {path}"))

    def _tile(self, path: str, chunk: Any, dtype: torch.dtype, stored: Mapping[Any, Any]) -> Tile:
        offsets, sizes = _sizes(chunk.offsets, self.place), _sizes(chunk.sizes, self.place)
        box = tuple((a, a + n) for a, n in zip(offsets, sizes, strict=True))
        info = stored.get(offsets)
        if info is None:
            raise ValueError(f"{self.place}: no file has {path} at {list(offsets)}. {_FIX}")
        where = self._where(info, path)
        return Tile(box=box, read=partial(self._read, where, Array(shape=sizes, dtype=dtype)))

    def _where(self, info: Any, path: str) -> tuple[Path, int, int]:
        name, offset, length = info.relative_path, info.offset, info.length
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{self.place}: {path} is compressed. Save it without transforms.")
        if not isinstance(name, str) or type(offset) is not int or type(length) is not int:
            raise ValueError(f"{self.place}: {path} has no place in a file. {_FIX}")
        if name not in self._files:
            self._files[name] = checked_file(self.folder, name, place=self.place)
        file = self._files[name]
        if offset < 0 or length < 0 or offset + length > file.stat().st_size:
            raise ValueError(
                f"{self.place}: {path} is at bytes {offset} to {offset + length} of {name}, which "
                f"has {file.stat().st_size}. {_FIX}"
            )
        return file, offset, length

    def _bytes(self, file: Path, offset: int, length: int) -> bytes:
        with open(file, "rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def _read(self, where: tuple[Path, int, int], array: Array, box: Box) -> Tensor:
        key = str(where[0]), where[1]
        with self._lock:  # torch loads one archive at a time; bytes are read beside one another
            if key not in self._regions:
                self._regions[key] = self._locate(*where, array)
        return read_region(self._regions[key], box)

    def _locate(self, file: Path, offset: int, length: int, array: Array) -> Region:
        place = f"{file} at byte {offset}"
        region = archive.locate(file, offset, length, place)
        if region is None:
            raise ValueError(
                f"{place}: its elements are not in row-major order. Save contiguous tensors."
            )
        if region.array != array:
            raise ValueError(f"{place}: is not {array}, as the metadata says. {_FIX}")
        return region


class _Record:
    """An object of the metadata: its fields, nothing else of its class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple) and state and isinstance(state[0], torch.dtype):
            self.dtype = state[0]  # of TensorProperties, the only one with a tuple


class _Unpickler(pickle.Unpickler):
    """Makes records, sizes and dtypes out of a pickle, and refuses every other name."""

    def __init__(self, stream: io.BufferedReader, place: str) -> None:
        super().__init__(stream)
        self.place = place

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "pathlib" and name in ("PosixPath", "PurePosixPath", "Path"):
            return _Record
        if module.startswith(_MODULES):
            return _Record
        raise ValueError(f"{self.place}: asks for {module}.{name}, which is no data. {_FIX}")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"{self.place}: refers to something outside. {_FIX}")


def _read_metadata(file: Path) -> Any:
    try:
        with open(file, "rb") as stream:
            told = _Unpickler(stream, str(file)).load()
    except ValueError as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file}: no metadata ({error}). {_FIX}") from None
    except Exception as error:
        raise ValueError(f"{file}: no metadata ({type(error).__name__}). {_FIX}") from None
    tables = (getattr(told, "state_dict_metadata", None), getattr(told, "storage_data", None))
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{file}: has no tables of tensors and of places. {_FIX}")
    return told


def _sizes(value: Any, place: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{place}: {value!r} are no sizes. {_FIX}")
    return value


class DcpWriter:
    """Writes tensors, box by box, into one file that torch.distributed.checkpoint loads.

    Args:
        folder: empty.
        arrays: what it will hold.
        blobs: values beside them, by path.
    """

    def __init__(
        self, folder: Path, arrays: Mapping[str, Array], blobs: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.arrays = folder, arrays
        self.file, self.at = folder / "__0_0.distcp", 0
        self.places: list[tuple[str, Box | None, int, int]] = []
        self.file.touch(exist_ok=False)
        for path, value in (blobs or {}).items():
            self._append(path, None, value)

    def write(self, path: str, box: Box, data: Tensor) -> None:
        """Write the elements of a box."""
        self._append(path, box, data.detach().contiguous().clone())

    def _append(self, path: str, box: Box | None, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        with open(self.file, "ab") as stream:
            stream.write(buffer.getbuffer())
        length = buffer.tell()
        self.places.append((path, box, self.at, length))
        self.at += length

    def finish(self) -> None:
        """Write the metadata, and wait for the disk."""
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )

        entries: dict[str, Any] = {
            path: TensorStorageMetadata(
                properties=TensorProperties(dtype=array.dtype),
                size=torch.Size(array.shape),
                chunks=[],
            )
            for path, array in self.arrays.items()
        }
        storage: dict[Any, Any] = {}
        for path, box, offset, length in self.places:
            at = torch.Size([start for start, _ in box]) if box is not None else None
            if box is None or at is None:
                entries[path] = BytesStorageMetadata()
            else:
                chunk = ChunkStorageMetadata(offsets=at, sizes=torch.Size(extents(box)))
                entries[path].chunks.append(chunk)
            index = len(entries[path].chunks) - 1 if box is not None else None
            storage[MetadataIndex(fqn=path, offset=at, index=index)] = _StorageInfo(
                relative_path=self.file.name, offset=offset, length=length
            )
        told = Metadata(
            state_dict_metadata=entries,
            planner_data={path: (path,) for path in entries},
            storage_data=storage,
            storage_meta=StorageMeta(),
        )
        sync(self.file)
        with open(self.folder / METADATA, "xb") as stream:
            pickle.dump(told, stream)
            stream.flush()
            os.fsync(stream.fileno())
