"""The layout of an `.idx` file: a header, three arrays and an optional fourth, all little endian.

    9 bytes   magic            8 bytes   version, 1         1 byte    code of the token's dtype
    8 bytes   S, sequences     8 bytes   D, documents + 1
    int32[S]  tokens of each sequence          int64[S]  byte at which each starts in the `.bin`
    int64[D]  sequences before each document, then S     int8[S]   modes, in multimodal data only

The header does not say whether there are modes: the size of the file does.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int8, Int32, Int64

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# Codes of the format; 6 and 7 are in this order.
DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_HEADER = struct.Struct("<9sQBQQ")
_CHECKED_AT_ONCE = 1 << 20  # sequences: bounds the memory of the checks


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """What an `.idx` file says, every number of it checked; the arrays lie in the mapped file.

    Attributes:
        dtype: of the tokens.
        lengths: tokens of each sequence.
        pointers: byte of the `.bin` at which each sequence starts.
        documents: sequences before each document, then the number of sequences.
        modes: one number per sequence in multimodal data, else None.
        num_bytes: size that the `.bin` must have.
    """

    dtype: np.dtype
    lengths: Int32[np.ndarray, " num_sequences"]
    pointers: Int64[np.ndarray, " num_sequences"]
    documents: Int64[np.ndarray, " num_bounds"]
    modes: Int8[np.ndarray, " num_sequences"] | None
    num_bytes: int


def code_of(dtype: np.dtype) -> int:
    """Return the code of a dtype.

    Raises:
        ValueError: the format has none for it.
    """
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    names = ", ".join(known.name for known in DTYPES.values())
    raise ValueError(f"IndexedWriter: dtype {dtype} has no code. Use one of {names}.")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which Megatron's tools write ids of a vocabulary of this size.

    The bound is 65500, not 65536. A reader never repeats this rule: the file says its dtype, and
    a vocabulary of 65500 to 65536 entries would be read as garbage by one that guesses.

    >>> token_dtype(65499).name, token_dtype(65500).name
    ('uint16', 'int32')
    """
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def read_index(path: Path) -> Index:
    """Map an `.idx` file and check all of it; nothing is allocated on the word of the header.

    Raises:
        ValueError: the file is no index, is cut, or contradicts itself.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEADER.size)
        if not head.startswith(MAGIC):
            raise ValueError(
                f"{path}: starts with {head[: len(MAGIC)]!r}, not with {MAGIC!r}. "
                "Name the prefix of an indexed pair, without .idx or .bin."
            )
        if len(head) < _HEADER.size:
            raise ValueError(_cut(path, f"{size} bytes do not hold a header of {_HEADER.size}"))
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
        if version != VERSION:
            raise ValueError(f"{path}: version {version} is not {VERSION}. Write the pair again.")
        if code not in DTYPES:
            raise ValueError(f"{path}: dtype code {code} is not one of 1 to 8. {_AGAIN}")
        _check_size(path, size, num_sequences, num_bounds)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _parse(path, mapped, DTYPES[code], num_sequences, num_bounds)


def write_index(
    dtype: np.dtype,
    lengths: Int32[np.ndarray, " num_sequences"],
    documents: Int64[np.ndarray, " num_bounds"],
    modes: Int8[np.ndarray, " num_sequences"] | None,
) -> Iterator[bytes]:
    """Yield the bytes of an `.idx` file in pieces of bounded size."""
    yield _HEADER.pack(MAGIC, VERSION, code_of(dtype), len(lengths), len(documents))
    yield from _pieces(lengths, "<i4")
    at = 0
    for start in range(0, len(lengths), _CHECKED_AT_ONCE):
        ends = at + np.cumsum(lengths[start : start + _CHECKED_AT_ONCE], dtype=np.int64)
        pointers = np.concatenate([[at], ends[:-1]]) * dtype.itemsize
        yield pointers.astype("<i8").tobytes()
        at = int(ends[-1])
    yield from _pieces(documents, "<i8")
    if modes is not None:
        yield from _pieces(modes, "i1")


def _pieces(array: np.ndarray, dtype: str) -> Iterator[bytes]:
    for start in range(0, len(array), _CHECKED_AT_ONCE):
        yield array[start : start + _CHECKED_AT_ONCE].astype(dtype, copy=False).tobytes()


_AGAIN = "The file is damaged: write the pair again."


def _cut(path: Path, what: str) -> str:
    return f"{path}: {what}. The file is cut or damaged: write the pair again."


def _check_size(path: Path, size: int, num_sequences: int, num_bounds: int) -> None:
    needed = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if num_bounds < 1 or size not in (needed, needed + num_sequences):
        raise ValueError(
            _cut(
                path,
                f"the header tells of {num_sequences} sequences and {num_bounds - 1} documents, "
                f"which take {needed} bytes ({needed + num_sequences} with modes), and the file "
                f"has {size}",
            )
        )


def _parse(path: Path, mapped: mmap.mmap, dtype: np.dtype, s: int, d: int) -> Index:
    at = _HEADER.size
    lengths = np.frombuffer(mapped, "<i4", s, at)
    pointers = np.frombuffer(mapped, "<i8", s, at + 4 * s)
    documents = np.frombuffer(mapped, "<i8", d, at + 12 * s)
    modes = (
        np.frombuffer(mapped, "i1", s, at + 12 * s + 8 * d) if _has_modes(mapped, s, d) else None
    )
    num_bytes = _check_sequences(path, lengths, pointers, dtype.itemsize)
    _check_documents(path, documents, s)
    return Index(
        dtype=dtype,
        lengths=lengths,
        pointers=pointers,
        documents=documents,
        modes=modes,
        num_bytes=num_bytes,
    )


def _has_modes(mapped: mmap.mmap, s: int, d: int) -> bool:
    return s > 0 and len(mapped) > _HEADER.size + 12 * s + 8 * d


def _check_sequences(path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Return the bytes of all sequences, which must lie end to end from byte 0."""
    at = 0
    for start in range(0, len(lengths), _CHECKED_AT_ONCE):
        some = lengths[start : start + _CHECKED_AT_ONCE].astype(np.int64)
        if some.min() < 0:
            bad = int(np.argmax(some < 0))
            raise ValueError(f"{path}: sequence {start + bad} has {some[bad]} tokens. {_AGAIN}")
        ends = at + np.cumsum(some * itemsize)
        told = pointers[start : start + _CHECKED_AT_ONCE]
        wrong = told != np.concatenate([[at], ends[:-1]])
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise ValueError(
                f"{path}: sequence {start + bad} starts at byte {told[bad]}, "
                f"and the one before it ends at {ends[bad - 1] if bad else at}. {_AGAIN}"
            )
        at = int(ends[-1])
    return at


def _check_documents(path: Path, documents: np.ndarray, num_sequences: int) -> None:
    if documents[0] != 0 or documents[-1] != num_sequences:
        raise ValueError(
            f"{path}: documents run from sequence {documents[0]} to {documents[-1]}, "
            f"not from 0 to {num_sequences}. {_AGAIN}"
        )
    for start in range(0, len(documents) - 1, _CHECKED_AT_ONCE):
        some = documents[start : start + _CHECKED_AT_ONCE + 1]
        if (falls := some[1:] < some[:-1]).any():
            bad = int(np.argmax(falls))
            raise ValueError(
                f"{path}: document {start + bad} runs from sequence {some[bad]} back to "
                f"{some[bad + 1]}. {_AGAIN}"
            )
