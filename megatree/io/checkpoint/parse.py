"""Reading a manifest that may lie: every field is checked before a file is opened."""

import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from struct import unpack
from typing import Any, TypeVar

import msgpack

from megatree.io.checkpoint.box import Box, first_gap, first_overlap, spelled, volume, whole
from megatree.io.checkpoint.dtypes import DTYPES
from megatree.io.checkpoint.extra import check_extra
from megatree.io.checkpoint.manifest import (
    ALIGNMENT,
    FORMAT,
    MANIFEST_FILE,
    MOST_BLOCK_BYTES,
    VERSION,
    Chunk,
    Manifest,
    StoredLeaf,
)
from megatree.io.checkpoint.piece import Leaf
from megatree.io.checkpoint.place import Unreadable, place_of

T = TypeVar("T")
# Nothing but this shape is a file name, so none can lead out of the directory.
_FILE_NAME = re.compile(r"rank_[0-9]{5,}\.bin", re.ASCII)
_FIX = "The manifest is damaged or was not written by megatree: load another checkpoint."


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of the checkpoint directory `path`, checked.

    Raises:
        ValueError: there is none, it is damaged, or this version cannot read it.
    """
    place = place_of(path)
    try:
        raw = place.get(MANIFEST_FILE)
    except (Unreadable, NotADirectoryError) as error:
        wrong = str(error) if isinstance(error, Unreadable) else "is missing"
        raise ValueError(
            f"{place}: there is no checkpoint here, the file {MANIFEST_FILE} {wrong}. "
            "Give the directory of one step, for example the one that latest() returns."
        ) from None
    return decode(raw, f"{place}/{MANIFEST_FILE}")


def decode(raw: bytes, place: str) -> Manifest:
    """Return the manifest of these bytes; `place` names them in errors."""
    envelope = _unpack(raw, place)
    if _field(envelope, "format", str, place) != FORMAT:
        raise ValueError(f"{place}: the format is '{envelope['format']}', not '{FORMAT}'. {_FIX}")
    version = _field(envelope, "version", int, place)
    if version > VERSION:
        raise ValueError(
            f"{place}: written in format version {version}, this megatree reads up to {VERSION}. "
            "Load it with a newer megatree."
        )
    _need(version == VERSION, place, f"format version {version} was never written")
    body = _field(envelope, "body", bytes, place)
    declared, found = _field(envelope, "crc32", int, place), zlib.crc32(body)
    _need(declared == found, place, f"its checksum is {found:#010x}, it declares {declared:#010x}")
    return _manifest(_unpack(body, place), place)


def _need(holds: bool, place: str, wrong: str) -> None:
    if not holds:
        raise ValueError(f"{place}: {wrong}. {_FIX}")


def _unpack(raw: bytes, place: str) -> Any:
    try:
        return msgpack.unpackb(raw)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{place}: {len(raw)} bytes that are not one msgpack value "
            f"({type(error).__name__}). {_FIX}"
        ) from None


def _field(record: Any, key: str, kind: type[T], place: str) -> T:
    _need(type(record) is dict and key in record, place, f"the field '{key}' is missing")
    value = record[key]
    # `type is`: a bool is an int to isinstance, and no size is a bool
    _need(
        type(value) is kind,
        place,
        f"the field '{key}' is {type(value).__name__}, not {kind.__name__}",
    )
    return value


def _manifest(body: Any, place: str) -> Manifest:
    block_bytes = _field(body, "block_bytes", int, place)
    _need(
        0 < block_bytes <= MOST_BLOCK_BYTES and block_bytes % ALIGNMENT == 0,
        place,
        f"block_bytes is {block_bytes}, no positive multiple of {ALIGNMENT} up to "
        f"{MOST_BLOCK_BYTES}",
    )
    names, files = [], {}
    for record in _field(body, "files", list, place):
        name, nbytes = _field(record, "name", str, place), _field(record, "nbytes", int, place)
        _need(
            _FILE_NAME.fullmatch(name) is not None,
            place,
            f"the file name {name!r} is not rank_NNNNN.bin in the checkpoint's own directory",
        )
        _need(
            name not in files and nbytes >= 0,
            place,
            f"the file {name} has {nbytes} bytes or is listed twice",
        )
        names.append(name)
        files[name] = nbytes
    leaves = tuple(
        _leaf(record, names, block_bytes, place) for record in _field(body, "leaves", list, place)
    )
    paths = [stored.leaf.path for stored in leaves]
    _need(len(set(paths)) == len(paths), place, "two leaves have the same path")
    _check_bytes(leaves, files, place)
    extra = _field(body, "extra", dict, place)
    check_extra(extra, f"{place}: extra")
    return Manifest(leaves=leaves, files=files, block_bytes=block_bytes, extra=extra)


def _leaf(record: Any, names: list[str], block_bytes: int, place: str) -> StoredLeaf:
    path = _field(record, "path", str, place)
    place = f"{place}: {path}"
    dtype = _field(record, "dtype", str, place)
    if dtype not in DTYPES:
        raise ValueError(
            f"{place}: this torch has no dtype '{dtype}'. Load it with the torch that wrote it."
        )
    shape = tuple(_ints(_field(record, "shape", list, place), "shape", place))
    axes = _field(record, "axes", str, place)
    try:
        leaf = Leaf(path=path, shape=shape, dtype=DTYPES[dtype], axes=axes)
    except ValueError as error:
        raise ValueError(f"{place}: {error} {_FIX}") from None
    chunks = tuple(
        _chunk(chunk, leaf, names, block_bytes, place)
        for chunk in _field(record, "chunks", list, place)
    )
    boxes = [chunk.box for chunk in chunks]
    overlap = first_overlap(boxes)
    if overlap:
        _need(False, place, f"the chunks {spelled(overlap[0])} and {spelled(overlap[1])} overlap")
    covered, total = sum(map(volume, boxes)), volume(whole(shape))
    if covered != total:
        gap = spelled(first_gap(whole(shape), boxes) or ())
        _need(False, place, f"its chunks hold {covered} of {total} elements, none holds {gap}")
    return StoredLeaf(leaf=leaf, chunks=chunks)


def _ints(values: Iterable[Any], what: str, place: str) -> list[int]:
    listed = list(values)
    _need(
        all(type(value) is int for value in listed), place, f"{what} has a value that is no integer"
    )
    return listed


def _chunk(record: Any, leaf: Leaf, names: list[str], block_bytes: int, place: str) -> Chunk:
    box = _box(_field(record, "box", list, place), leaf, place)
    file = _field(record, "file", int, place)
    _need(0 <= file < len(names), place, f"a chunk is in file {file} of {len(names)}")
    offset, nbytes = _field(record, "offset", int, place), _field(record, "nbytes", int, place)
    _need(
        offset >= 0 and offset % ALIGNMENT == 0,
        place,
        f"a chunk starts at byte {offset}, no multiple of {ALIGNMENT}",
    )
    expected = leaf.box_nbytes(box)
    _need(nbytes == expected, place, f"a chunk of {expected} bytes declares {nbytes}")
    packed, num_blocks = _field(record, "crc32", bytes, place), -(-nbytes // block_bytes)
    _need(
        len(packed) == 4 * num_blocks,
        place,
        f"a chunk of {num_blocks} blocks has {len(packed)} bytes of checksums",
    )
    checksums = unpack(f"<{num_blocks}I", packed)
    return Chunk(box=box, file=names[file], offset=offset, nbytes=nbytes, checksums=checksums)


def _box(record: list[Any], leaf: Leaf, place: str) -> Box:
    _need(
        len(record) == len(leaf.shape) and all(type(r) is list and len(r) == 2 for r in record),
        place,
        f"a box is not {len(leaf.shape)} pairs",
    )
    box = tuple((start, stop) for start, stop in (_ints(edge, "a box", place) for edge in record))
    _need(
        all(0 <= start < stop <= size for (start, stop), size in zip(box, leaf.shape, strict=True)),
        place,
        f"the box {spelled(box)} is empty or not inside the shape {leaf.shape}",
    )
    return box


def _check_bytes(leaves: Iterable[StoredLeaf], files: dict[str, int], place: str) -> None:
    """No chunk may run past the end of its file or into another chunk."""
    used = defaultdict(list)
    for stored in leaves:
        for chunk in stored.chunks:
            used[chunk.file].append((chunk.offset, chunk.offset + chunk.nbytes, stored.leaf.path))
    for file, ranges in used.items():
        end, before = 0, ""
        for start, stop, path in sorted(ranges):
            _need(start >= end, place, f"chunks of {before} and {path} share bytes of {file}")
            end, before = stop, path
        _need(
            end <= files[file],
            place,
            f"a chunk of {before} ends at byte {end} of {file}, which has {files[file]}",
        )
