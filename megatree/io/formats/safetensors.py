"""safetensors: a header of JSON, then raw tensors; read and written by boxes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.formats.arrays import Array
from megatree.io.formats.raw import Region

# A header of a hundred thousand tensors takes about 12 MB; safetensors itself stops here.
MOST_HEADER_BYTES = 100_000_000
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "BOOL": torch.bool,
    }
)
_FIX = "The file is damaged or hostile: take another copy."


def read_header(file: Path) -> dict[str, Region]:
    """Return where the tensors of a file are, checked: nothing is read or allocated on a lie.

    Raises:
        ValueError: the header contradicts itself or the size of the file.
    """
    size = os.stat(file).st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(
                f"{file}: the header says it has {length} bytes, the file has {size}. {_FIX}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: the header is no JSON ({error}). {_FIX}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is no JSON object. {_FIX}")
    header.pop("__metadata__", None)
    start, found, ends = 8 + length, {}, []
    for name, record in header.items():
        region, end = _region(file, name, record, start, size)
        found[name] = region
        ends.append((region.offset, end, name))
    at = start
    for begin, end, name in sorted(ends):
        if begin != at:
            raise ValueError(
                f"{file}: {name} begins at byte {begin}, and what is before it ends at {at}. {_FIX}"
            )
        at = end
    if at != size:
        raise ValueError(f"{file}: its tensors end at byte {at}, the file at {size}. {_FIX}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _region(file: Path, name: str, record: Any, start: int, size: int) -> tuple[Region, int]:
    def need(holds: bool, wrong: str) -> None:
        if not holds:
            raise ValueError(f"{file}: {name}: {wrong}. {_FIX}")

    need(isinstance(record, dict), "no JSON object")
    dtype, shape, offsets = (record.get(key) for key in ("dtype", "shape", "data_offsets"))
    need(isinstance(dtype, str) and dtype in _DTYPES, f"unknown dtype {dtype!r}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        good = isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)
        need(good, f"{what} is {values!r}, no list of sizes")
    need(len(shape) <= 64, f"{len(shape)} dims")
    need(len(offsets) == 2 and offsets[0] <= offsets[1], f"data_offsets are {offsets}")
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    need(
        offsets[1] - offsets[0] == nbytes,
        f"{dtype} {shape} takes {nbytes} bytes, data_offsets are {offsets}",
    )
    need(start + offsets[1] <= size, f"ends at byte {start + offsets[1]}, the file at {size}")
    array = Array(shape=tuple(shape), dtype=_DTYPES[dtype])
    return Region(file=file, offset=start + offsets[0], array=array), start + offsets[1]


def create(
    file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]
) -> dict[str, Region]:
    """Make a new file with its header and room for the tensors; return where they go."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, array in arrays.items():
        if array.dtype not in names:
            raise ValueError(
                f"{name}: safetensors has no {dtype_name(array.dtype)}. Convert it with --dtype."
            )
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "xb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + at)
    start = 8 + len(raw)
    return {
        name: Region(file=file, offset=start + header[name]["data_offsets"][0], array=array)
        for name, array in arrays.items()
    }
