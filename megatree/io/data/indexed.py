"""Token sequences on disk as a `.bin`/`.idx` pair that Megatron reads and writes too."""

import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32, Int64, Integer, Shaped

from megatree.io.data.atomic import StagedFile, sync_directory
from megatree.io.data.index_format import code_of, read_index, write_index

_COPIED_AT_ONCE = 1 << 24  # bytes
_HASHED_BLOCKS = 64
_HASHED_BLOCK = 1 << 12  # bytes


class IndexedFile:
    """A pair on disk, mapped into memory: opening one reads its index and none of its tokens.

    Attributes:
        prefix: the path without `.bin` or `.idx`.
        dtype: of a token, as the file says.
        lengths: tokens of each sequence.
        documents: sequences before each document, then the number of sequences.
        modes: one number per sequence in multimodal data, else None.
        tokens: all sequences end to end.
        pointers: byte of the `.bin` at which each sequence starts.

    Raises:
        ValueError: the pair is cut, damaged or no pair; the text names the file and the number.
        FileNotFoundError: one of the two is missing.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        idx, bin_ = _paths(self.prefix)
        for path in (idx, bin_):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path}: is not there. Name the prefix of a pair, without .idx or .bin."
                )
        self._stamps = {path: _stamp(path) for path in (idx, bin_)}
        index = read_index(idx)
        size = bin_.stat().st_size
        if size != index.num_bytes:
            raise ValueError(
                f"{bin_}: has {size} bytes, and {idx.name} tells of {index.num_bytes}. "
                "The pair is cut or mixed: write it again."
            )
        self.dtype = index.dtype
        self.lengths: Int32[np.ndarray, " num_sequences"] = index.lengths
        self.pointers: Int64[np.ndarray, " num_sequences"] = index.pointers
        self.documents: Int64[np.ndarray, " num_bounds"] = index.documents
        self.modes: Int8[np.ndarray, " num_sequences"] | None = index.modes
        self.tokens: Shaped[np.ndarray, " num_tokens"] = _map_tokens(bin_, index.dtype)
        self._identity = ""
        self.verify()

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.documents) - 1

    def __getitem__(self, sequence: int) -> Shaped[np.ndarray, " length"]:
        if not 0 <= sequence < len(self):
            raise IndexError(
                f"{self.prefix}: sequence {sequence} is not one of {len(self)}. Count from 0."
            )
        start = int(self.pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[sequence])]

    def starts(self, sequences: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the place in `tokens` of the first token of each sequence."""
        return self.pointers[sequences] // self.dtype.itemsize

    def take(self, places: Integer[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """Return the tokens at some places of `tokens`."""
        return self.tokens[places]

    def document(self, document: int) -> list[Shaped[np.ndarray, " length"]]:
        """Return the sequences of a document."""
        if not 0 <= document < self.num_documents:
            raise IndexError(
                f"{self.prefix}: document {document} is not one of {self.num_documents}. "
                "Count from 0."
            )
        return [self[i] for i in range(self.documents[document], self.documents[document + 1])]

    @property
    def identity(self) -> str:
        """Digest of the index, of the size of the `.bin` and of 64 blocks spread over it.

        Equal for a copy elsewhere. All of the `.bin` is not read: it may be terabytes.
        """
        if not self._identity:
            idx, _ = _paths(self.prefix)
            digest = hashlib.sha256()
            with open(idx, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            raw = self.tokens.view(np.uint8)
            digest.update(raw.size.to_bytes(8, "little"))
            for at in np.linspace(0, max(raw.size - _HASHED_BLOCK, 0), _HASHED_BLOCKS).astype(int):
                digest.update(raw[at : at + _HASHED_BLOCK].tobytes())
            self._identity = digest.hexdigest()
        return self._identity

    def verify(self) -> None:
        """Check that the files at this prefix are still the ones that were opened.

        Raises:
            ValueError: one was written, replaced or removed since.
        """
        for path, stamp in self._stamps.items():
            try:
                now = _stamp(path)
            except FileNotFoundError:
                now = None
            if now != stamp:
                what = "was removed" if now is None else "changed"
                raise ValueError(
                    f"{path}: {what} while it was in use. Put the old file back or start again; "
                    "write new data under a new name."
                )


class IndexedWriter:
    """Write a pair under temporary names; it takes its own when the `with` block ends.

    A block that raises, or a killed process, leaves no pair. The `.idx` is renamed last.

    Args:
        prefix: the path without `.bin` or `.idx`; its directory is made.
        dtype: of a token; `token_dtype(vocab_size)` is what Megatron's tools use.
        modes: whether every sequence comes with a mode (multimodal data).
        overwrite: replace a pair of this name; refused by default, before any work.

    Raises:
        ValueError: the dtype has no code in the format, or the pair exists.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: Any,
        *,
        modes: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        code_of(self.dtype)
        self._overwrite = overwrite
        self._refuse_existing()
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._modes = array("b") if modes else None
        idx, bin_ = _paths(self.prefix)
        self._bin = StagedFile(bin_)
        try:
            self._idx = StagedFile(idx)
        except BaseException:
            self._bin.discard()
            raise

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._bin.discard()
            self._idx.discard()

    @property
    def num_sequences(self) -> int:
        """Sequences added so far."""
        return len(self._lengths)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    def add_document(
        self,
        sequences: Sequence[Sequence[int] | Shaped[np.ndarray, " _"]],
        *,
        modes: Sequence[int] | None = None,
    ) -> None:
        """Add one document of any number of sequences; each may be empty.

        Raises:
            ValueError: an id does not fit the dtype, or modes are missing or too many.
        """
        arrays = [np.asarray(s) if len(s) else np.zeros(0, self.dtype) for s in sequences]
        lengths = np.array([len(s) for s in arrays], np.int64)
        flat = np.concatenate([np.zeros(0, self.dtype), *arrays]) if len(arrays) != 1 else arrays[0]
        self.add_documents(
            flat,
            lengths,
            np.array([len(arrays)]),
            modes=None if modes is None else np.array(modes, np.int8),
        )

    def add_documents(
        self,
        tokens: Shaped[np.ndarray, " num_tokens"],
        lengths: Integer[np.ndarray, " num_sequences"],
        sequences: Integer[np.ndarray, " num_documents"],
        *,
        modes: Int8[np.ndarray, " num_sequences"] | None = None,
    ) -> None:
        """Add many documents at once.

        Args:
            tokens: all sequences end to end.
            lengths: tokens of each sequence.
            sequences: sequences of each document; 0 makes an empty one.
            modes: of each sequence, where the writer has modes.

        Raises:
            ValueError: the counts do not add up, or an id does not fit the dtype.
        """
        lengths = lengths.astype(np.int64)
        if (lengths < 0).any() or lengths.sum() != len(tokens) or sequences.sum() != len(lengths):
            raise ValueError(
                f"{self.prefix}: {len(tokens)} tokens, {len(lengths)} sequences of "
                f"{lengths.sum()} tokens, and documents of {sequences.sum()} sequences do not "
                "agree. Pass the length of each sequence and the sequences of each document."
            )
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise ValueError(
                f"{self.prefix}: a sequence of {lengths.max()} tokens does not fit the format's "
                "int32. Split it."
            )
        if (modes is None) != (self._modes is None) or (
            modes is not None and len(modes) != len(lengths)
        ):
            raise ValueError(
                f"{self.prefix}: {'no' if modes is None else len(modes)} modes for "
                f"{len(lengths)} sequences. Pass one each if the writer was made with modes=True, "
                "else none."
            )
        self._bin.write(np.ascontiguousarray(self._cast(tokens, lengths)).view(np.uint8).data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        ends = self._documents[-1] + np.cumsum(sequences, dtype=np.int64)
        self._documents.frombytes(ends.tobytes())
        if self._modes is not None and modes is not None:
            self._modes.frombytes(modes.tobytes())

    def add_file(self, source: IndexedFile) -> None:
        """Append all documents of a pair; its bytes are copied as they are.

        Raises:
            ValueError: the dtypes differ, or one of the two has modes.
        """
        if source.dtype != self.dtype:
            raise ValueError(
                f"{source.prefix}: dtype {source.dtype} cannot be appended to {self.dtype} in "
                f"{self.prefix}. Preprocess both with one tokenizer."
            )
        if (source.modes is None) != (self._modes is None):
            raise ValueError(
                f"{source.prefix}: {'has no' if source.modes is None else 'has'} modes, unlike "
                f"{self.prefix}. Merge pairs of one kind."
            )
        before = len(self._lengths)
        raw = source.tokens.view(np.uint8)
        for start in range(0, raw.size, _COPIED_AT_ONCE):
            self._bin.write(np.ascontiguousarray(raw[start : start + _COPIED_AT_ONCE]).data)
        self._lengths.frombytes(source.lengths.tobytes())
        self._documents.frombytes((before + source.documents[1:]).tobytes())
        if self._modes is not None and source.modes is not None:
            self._modes.frombytes(source.modes.tobytes())
        source.verify()

    def _cast(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if tokens.dtype == self.dtype or not tokens.size:
            return tokens.astype(self.dtype, copy=False)
        if self.dtype.kind == "f":
            return tokens.astype(self.dtype)
        info = np.iinfo(self.dtype)
        if tokens.dtype.kind not in "iu" or tokens.min() < info.min or tokens.max() > info.max:
            outside = ~((tokens >= info.min) & (tokens <= info.max) & (tokens == tokens // 1))
            bad = int(np.argmax(outside))
            sequence = int(np.searchsorted(np.cumsum(lengths), bad, side="right"))
            raise ValueError(
                f"{self.prefix}: {tokens[bad]} in sequence {len(self._lengths) + sequence} is no "
                f"{self.dtype} ({info.min} to {info.max}). "
                "Use token_dtype(vocab_size) of the tokenizer."
            )
        return tokens.astype(self.dtype)

    def _refuse_existing(self) -> None:
        found = [str(path) for path in _paths(self.prefix) if path.exists()]
        if found and not self._overwrite:
            raise ValueError(
                f"{' and '.join(found)}: already there. Choose another prefix, remove it, or pass "
                "overwrite=True."
            )

    def _commit(self) -> None:
        idx, _ = _paths(self.prefix)
        modes = None if self._modes is None else np.frombuffer(self._modes, np.int8)
        lengths = np.frombuffer(self._lengths, np.int32)
        documents = np.frombuffer(self._documents, np.int64)
        for piece in write_index(self.dtype, lengths, documents, modes):
            self._idx.write(piece)
        self._bin.sync()
        self._idx.sync()
        self._refuse_existing()
        # An old index must never stand beside new tokens.
        idx.unlink(missing_ok=True)
        sync_directory(idx.parent)
        self._bin.commit()
        self._idx.commit()


def merge_pairs(
    sources: Sequence[str | os.PathLike[str]],
    prefix: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write one pair that holds the documents of several, in the order given.

    Args:
        sources: prefixes, at least one; all of one dtype.
        prefix: of the pair to write.
        overwrite: replace a pair of this name.

    Raises:
        ValueError: a source is damaged, dtypes differ, there is none, or the pair exists.
    """
    if not sources:
        raise ValueError("merge_pairs: 0 sources give no pair. Name at least one prefix.")
    files = [IndexedFile(source) for source in sources]
    with IndexedWriter(
        prefix, files[0].dtype, modes=files[0].modes is not None, overwrite=overwrite
    ) as writer:
        for file in files:
            writer.add_file(file)


def _paths(prefix: str) -> tuple[Path, Path]:
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def _stamp(path: Path) -> tuple[int, int, int, int]:
    info = path.stat()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    # A plain array over the map: a memmap's every slice would carry a Python attribute or two.
    return np.asarray(np.memmap(path, dtype, "r"))
