"""Orbax: what JAX programs save and restore, arrays in zarr through tensorstore."""

import json
from collections import deque
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box
from megatree.io.checkpoint.dtypes import DTYPES, dtype_name
from megatree.io.checkpoint.place import Folder
from megatree.io.formats.arrays import AHEAD, BOX_BYTES, Array, box_shape
from megatree.io.formats.hf import read_json
from megatree.io.formats.names import checked_file
from megatree.io.optional import optional

TREE = "_METADATA"
_FIX = "The checkpoint is damaged or hostile: take another copy."
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_DICT_KEY = 2
# zstd packs constants some thousand times; what claims more than this, and much, is no model.
_MOST_EXPANSION, _ALWAYS_BYTES = 10_000, 1 << 30
# numpy has no bfloat16 and no float8: their bytes travel as integers.
_CARRIER = {1: torch.uint8, 2: torch.uint16}


def _tensorstore() -> ModuleType:
    return optional("tensorstore", extra="jax", purpose="orbax")


class OrbaxReader:
    """The arrays of a checkpoint; a path is the keys of its tree with "." between.

    Args:
        path: has _METADATA, or a folder `default` that has (as CheckpointManager writes).

    Raises:
        ValueError: there is no checkpoint, or an array that we do not know.
    """

    def __init__(self, path: Path) -> None:
        folder = path if (path / TREE).exists() else path / "default"
        if folder.is_symlink() or not (folder / TREE).exists():
            raise ValueError(f"{path}: has no {TREE}. Give the folder that a Checkpointer wrote.")
        self.folder = folder
        told = read_json(checked_file(folder, TREE, place=str(folder)))
        for entry in folder.rglob("*"):
            if entry.is_symlink():
                raise ValueError(f"{entry}: a symbolic link. Copy the folder with 'cp -rL'.")
        self._stores: dict[str, Any] = {}
        opening: dict[str, Any] = {}
        self.arrays: dict[str, Array] = {}
        for name, record in _records(told, folder).items():
            path_of = _path_in(record, f"{folder}: {name}")
            if path_of is None:
                continue
            opening[path_of] = _open(folder, path_of, told)
        for path_of, future in opening.items():
            store = _opened(future, folder, path_of)
            name = store.dtype.name
            if name not in DTYPES:
                raise ValueError(f"{folder}: {path_of} has dtype {name}. Convert it in JAX.")
            self._stores[path_of] = store
            self.arrays[path_of] = Array(shape=tuple(store.shape), dtype=DTYPES[name])
        total = sum(array.nbytes for array in self.arrays.values())
        stored = sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())
        if total > max(_ALWAYS_BYTES, _MOST_EXPANSION * stored):
            raise ValueError(
                f"{folder}: its arrays say they are {total} bytes, its files have {stored}. {_FIX}"
            )

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box; tensorstore reads chunks in parallel, and boxes too."""
        store, array = self._stores[path], self.arrays[path]
        try:
            data = store[tuple(slice(*edge) for edge in box)].read().result()
        except ValueError as error:
            first = str(error).partition("\n")[0][:200]
            raise ValueError(f"{self.folder}: {path} cannot be read ({first}). {_FIX}") from None
        return _to_torch(np.asarray(data), array.dtype)


def _records(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    tree = told.get("tree_metadata")
    if not isinstance(tree, dict):
        raise ValueError(f"{folder}: {TREE} has no tree_metadata. {_FIX}")
    return tree


def _path_in(record: Any, place: str) -> str | None:
    """Return the path of an entry of the tree, or None if it is no array."""
    record = record if isinstance(record, dict) else {}
    keys, value = record.get("key_metadata"), record.get("value_metadata")
    names = [key.get("key") if isinstance(key, dict) else None for key in _list(keys)]
    kind = value.get("value_type") if isinstance(value, dict) else None
    if not names or not isinstance(kind, str) or not all(isinstance(x, (str, int)) for x in names):
        raise ValueError(f"{place}: no entry with key_metadata and value_metadata. {_FIX}")
    texts = [str(name) for name in names]
    _check_keys(texts, place)
    return None if kind in ("None", "Dict", "List", "string") else ".".join(texts)


def _check_keys(keys: list[str], place: str) -> None:
    """Refuse keys that would be a way out where they become the names of folders."""
    if any(key in ("", ".", "..") or "/" in key or "\0" in key for key in keys):
        raise ValueError(f"{place}: the key {'.'.join(keys)!r} leads out of it. {_FIX}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _open(folder: Path, path: str, told: Mapping[str, Any]) -> Any:
    ts = _tensorstore()
    ocdbt, zarr3 = told.get("use_ocdbt", True), told.get("use_zarr3", False)
    spec = _spec(folder, path, ocdbt=ocdbt, zarr3=zarr3)
    if told.get("store_array_data_equal_to_fill_value"):
        spec["fill_missing_data_reads"] = False  # zeros are stored: what is absent is damage
    return ts.open(spec, open=True, read=True)


def _opened(future: Any, folder: Path, path: str) -> Any:
    try:
        return future.result()
    except ValueError as error:
        first = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{folder}: {path} is listed, and cannot be opened ({first}). {_FIX}"
        ) from None


def _spec(folder: Path, path: str, *, ocdbt: bool, zarr3: bool) -> dict[str, Any]:
    base = folder.absolute().as_posix()
    if ocdbt:
        store = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{path}/"}
    else:
        store = {"driver": "file", "path": f"{base}/{path}/"}
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}


class OrbaxWriter:
    """Writes arrays that orbax.checkpoint.StandardCheckpointer restores.

    Args:
        folder: empty.
        arrays: what it will hold; the path's steps are the keys of the tree.
        most_bytes: bytes of a box of the grid.
    """

    def __init__(
        self, folder: Path, arrays: Mapping[str, Array], most_bytes: int = BOX_BYTES
    ) -> None:
        ts = _tensorstore()
        self.folder, self.arrays = folder, arrays
        for path in arrays:
            _check_keys(path.split("."), str(folder))
        self._stores = {}
        opened = {}
        for path, array in arrays.items():
            spec = _spec(folder, path, ocdbt=True, zarr3=False)
            chunks = [max(1, n) for n in box_shape(array, most_bytes)]
            spec["metadata"] = {
                "shape": list(array.shape),
                "chunks": chunks,
                "dtype": _zarr_dtype(array.dtype, path),
                "compressor": {"id": "zstd", "level": 1},
            }
            opened[path] = ts.open(spec, create=True, open=True, read=True, write=True)
        self._stores = {path: future.result() for path, future in opened.items()}
        self._pending: deque[Any] = deque()

    def write(self, path: str, box: Box, data: Tensor) -> None:
        """Write the elements of a box of the grid, while those before are being written."""
        store = self._stores[path]
        values = _to_numpy(data, store.dtype.numpy_dtype)
        if len(self._pending) == AHEAD:
            self._pending.popleft().result()
        self._pending.append(store[tuple(slice(*edge) for edge in box)].write(values))

    def finish(self) -> None:
        """Wait for what is being written, then write the tree."""
        while self._pending:
            self._pending.popleft().result()
        tree = {
            str(tuple(path.split("."))): {
                "key_metadata": [{"key": k, "key_type": _DICT_KEY} for k in path.split(".")],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(array.shape),
                },
            }
            for path, array in self.arrays.items()
        }
        told = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        outer = {"item_handlers": _HANDLER, "metrics": {}, "performance_metrics": {}}
        outer |= {"init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 1, "custom_metadata": {}}
        for name, value in ((TREE, told), ("_CHECKPOINT_METADATA", outer)):
            Folder(self.folder).put(name, json.dumps(value).encode())


def _zarr_dtype(dtype: torch.dtype, path: str) -> str:
    name = dtype_name(dtype)
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        return name
    try:
        return np.dtype(name).str if name != "bool" else "|b1"
    except TypeError:
        raise ValueError(f"{path}: orbax has no {name}. Convert it with --dtype.") from None


def _to_numpy(data: Tensor, dtype: Any) -> Any:
    data = data.detach().contiguous()
    if dtype_name(data.dtype) in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        return data.view(_CARRIER[data.dtype.itemsize]).numpy().view(dtype)
    return data.numpy()


def _to_torch(data: Any, dtype: torch.dtype) -> Tensor:
    shape, size = data.shape, dtype.itemsize
    if not data.size:
        return torch.empty(shape, dtype=dtype)
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    assert raw.size == prod(shape) * size
    return torch.from_numpy(raw.copy()).view(dtype).view(shape)
