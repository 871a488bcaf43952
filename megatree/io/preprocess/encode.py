"""From a block of documents to arrays of ids: the work of one process, a pure function."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int64, Integer

from megatree.io.data.index_format import token_dtype
from megatree.io.preprocess.blocks import MAX_LINE_BYTES, BadLine, Block, Rows, Unit
from megatree.io.preprocess.records import Texts, json_records, row_records, text_records
from megatree.io.preprocess.sentences import SentenceSplitter
from megatree.io.tokenizers import Tokenizer, TokenizerSpec, load_tokenizer

Format = Literal["jsonl", "parquet", "text"]
Piece: TypeAlias = Block | Rows | BadLine


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the ids of a document.

    Attributes:
        tokenizer: which one.
        keys: of the JSON objects (or columns of the table) to encode, each to a pair of its own.
        splitter: cuts texts into sentences, each a sequence of its own; None for one sequence per
            text.
        append_eod: end the last sequence of each document that has ids with the end-of-document id.
        text_unit: what a document of plain text is.
        max_line_bytes: the longest line, or document of plain text, that is accepted.
    """

    tokenizer: TokenizerSpec
    keys: tuple[str, ...] = ("text",)
    splitter: SentenceSplitter | None = None
    append_eod: bool = False
    text_unit: Unit = "paragraph"
    max_line_bytes: int = MAX_LINE_BYTES

    def __post_init__(self) -> None:
        if not self.keys or len(set(self.keys)) < len(self.keys):
            raise ValueError(
                f"json-keys: {list(self.keys)} must be different, and at least one. "
                "Name each key once."
            )
        for key in self.keys:
            if not key or "/" in key or "\0" in key:
                raise ValueError(
                    f"json-keys: {key!r} cannot be part of a file name. Rename the key in the data."
                )
        if self.max_line_bytes < 1:
            raise ValueError(f"max-line-bytes: {self.max_line_bytes} holds no line. Use 1 or more.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """The ids of one key: what `IndexedWriter.add_documents` takes."""

    tokens: Integer[np.ndarray, " num_tokens"]
    lengths: Int64[np.ndarray, " num_sequences"]
    sequences: Int64[np.ndarray, " num_documents"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """What became of a block.

    Attributes:
        columns: one per key.
        num_documents: of each column.
        num_bytes: of the block, uncompressed (of a table: of its texts).
        position: bytes of the file on disk read so far.
        bad: lines without a document.
    """

    columns: dict[str, Column]
    num_documents: int
    num_bytes: int
    position: int
    bad: list[BadLine] = field(default_factory=list)


def encode_block(recipe: Recipe, form: Format, block: Piece) -> Encoded:
    """Return the ids of the documents of a block; a line that was too long stays bad."""
    encoder = _encoder(recipe)
    if isinstance(block, BadLine):
        empty = encoder.columns([])
        return Encoded(columns=empty, num_documents=0, num_bytes=0, position=0, bad=[block])
    documents: list[tuple[int, Texts]] = []
    bad: list[BadLine] = []
    for record in records_of(recipe, form, block):
        if isinstance(record, BadLine):
            bad.append(record)
        else:
            documents.append(record)
    try:
        columns = encoder.columns([texts for _, texts in documents])
    except ValueError:
        # One text is refused (a null tokenizer's word that is no id): find out which.
        documents, refused = encoder.sift(block.file, documents)
        bad = sorted([*bad, *refused], key=lambda one: one.line)
        columns = encoder.columns([texts for _, texts in documents])
    return Encoded(
        columns=columns,
        num_documents=len(documents),
        num_bytes=_num_bytes(block),
        position=block.position,
        bad=bad,
    )


def records_of(recipe: Recipe, form: Format, block: Piece) -> Iterator[tuple[int, Texts] | BadLine]:
    """Return (line, texts by key) of the documents of a block, and its bad lines, in order."""
    if isinstance(block, BadLine):
        return iter([block])
    if isinstance(block, Rows):
        return row_records(block, recipe.keys)
    if form == "jsonl":
        return json_records(block, recipe.keys, max_line_bytes=recipe.max_line_bytes)
    return text_records(
        block, recipe.keys[0], recipe.text_unit, max_line_bytes=recipe.max_line_bytes
    )


def load_once(recipe: Recipe) -> Tokenizer:
    """Return the tokenizer of a recipe, kept for the next call of this process."""
    return _encoder(recipe).tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoder:
    recipe: Recipe
    tokenizer: Tokenizer
    dtype: np.dtype
    eod: int | None

    def columns(self, documents: Sequence[Texts]) -> dict[str, Column]:
        return {
            key: self._column([self._split(texts[key]) for texts in documents])
            for key in self.recipe.keys
        }

    def sift(
        self, file: str, documents: Sequence[tuple[int, Texts]]
    ) -> tuple[list[tuple[int, Texts]], list[BadLine]]:
        """Return the documents that can be encoded, and why the others cannot."""
        good, bad = [], []
        for line, texts in documents:
            try:
                self.columns([texts])
                good.append((line, texts))
            except ValueError as error:
                bad.append(BadLine(file=file, line=line, kind="not ids", detail=str(error)))
        return good, bad

    def _split(self, texts: list[str]) -> list[str]:
        splitter = self.recipe.splitter
        return (
            texts if splitter is None else [part for one in texts for part in splitter.split(one)]
        )

    def _column(self, documents: Sequence[Sequence[str]]) -> Column:
        ids = self.tokenizer.encode_batch([text for texts in documents for text in texts])
        sequences = np.empty(len(documents), np.int64)
        kept: list[list[int]] = []
        at = 0
        for number, texts in enumerate(documents):
            some = [one for one in ids[at : at + len(texts)] if one]
            at += len(texts)
            if some and self.eod is not None:
                some[-1].append(self.eod)
            sequences[number] = len(some)
            kept += some
        lengths = np.fromiter(map(len, kept), np.int64, len(kept))
        tokens = np.fromiter(chain.from_iterable(kept), self.dtype, int(lengths.sum()))
        return Column(tokens=tokens, lengths=lengths, sequences=sequences)


@lru_cache(maxsize=1)
def _encoder(recipe: Recipe) -> _Encoder:
    tokenizer = load_tokenizer(recipe.tokenizer)
    return _Encoder(
        recipe=recipe,
        tokenizer=tokenizer,
        dtype=token_dtype(tokenizer.vocab_size),
        eod=tokenizer.special.need("eod") if recipe.append_eod else None,
    )


def _num_bytes(block: Block | Rows) -> int:
    if isinstance(block, Block):
        return len(block.data)
    return sum(len(str(value)) for row in block.rows for value in row.values())
