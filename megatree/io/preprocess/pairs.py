"""What can be done with a pair besides training: merge, look into, write back as text."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from megatree.io.data.atomic import atomic_write
from megatree.io.data.indexed import IndexedFile, merge_pairs
from megatree.io.preprocess.compressed import compressed_writer
from megatree.io.preprocess.parallel import ordered_map
from megatree.io.tokenizers import (
    Tokenizer,
    TokenizerSpec,
    load_tokenizer,
    read_beside,
    require_same_identity,
    write_beside,
)

_DOCUMENTS_AT_ONCE = 512
_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long things are: smallest, middle, mean, 99th of 100, largest."""

    smallest: int
    median: float
    mean: float
    percentile_99: float
    largest: int

    @staticmethod
    def of(lengths: np.ndarray) -> "Lengths | None":
        """Return the statistics of some lengths; None if there are none."""
        if not lengths.size:
            return None
        return Lengths(
            smallest=int(lengths.min()),
            median=float(np.median(lengths)),
            mean=float(lengths.mean()),
            percentile_99=float(np.percentile(lengths, 99)),
            largest=int(lengths.max()),
        )


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The counts of a pair.

    Attributes:
        prefix: of the pair.
        dtype: of a token.
        documents: empty ones included.
        empty_documents: without any token.
        sequences: of all documents.
        tokens: of all sequences.
        tokens_per_document: lengths of documents.
        tokens_per_sequence: lengths of sequences.
        largest_id: over all tokens; None without tokens.
        smallest_id: over all tokens.
        tokenizer: what is stored beside the pair of it; None for nothing.
    """

    prefix: str
    dtype: str
    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    tokens_per_document: Lengths | None
    tokens_per_sequence: Lengths | None
    smallest_id: int | None
    largest_id: int | None
    tokenizer: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def inspect_pair(prefix: str | os.PathLike[str], *, vocab_size: int | None = None) -> Inspection:
    """Read a pair, all tokens included, and count.

    Args:
        prefix: of the pair.
        vocab_size: of the tokenizer, to check the ids against; by default what is stored beside.

    Raises:
        ValueError: if the pair is damaged, or an id is outside the vocabulary.
    """
    file = IndexedFile(prefix)
    bounds = np.concatenate([[0], np.cumsum(file.lengths, dtype=np.int64)])
    of_documents = np.diff(bounds[file.documents])
    smallest, largest = None, None
    facts = (read_beside(prefix) or {}).get("tokenizer")
    vocab_size = vocab_size or (facts or {}).get("vocab_size")
    for start in range(0, file.tokens.size, _TOKENS_AT_ONCE):
        some = file.tokens[start : start + _TOKENS_AT_ONCE]
        low, high = some.min().item(), some.max().item()
        smallest = low if smallest is None else min(smallest, low)
        largest = high if largest is None else max(largest, high)
        if vocab_size is not None and not 0 <= low <= high < vocab_size:
            at = start + int(np.argmax((some >= vocab_size) | (some < 0)))
            document = int(np.searchsorted(bounds[file.documents], at, side="right")) - 1
            raise ValueError(
                f"{file.prefix}.bin: token {at} (document {document}) is {file.tokens[at]}, "
                f"outside the vocabulary of {vocab_size}. "
                "Use the tokenizer that made the pair, or write the pair again."
            )
    return Inspection(
        prefix=file.prefix,
        dtype=file.dtype.name,
        documents=file.num_documents,
        empty_documents=int((of_documents == 0).sum()),
        sequences=len(file),
        tokens=int(bounds[-1]),
        tokens_per_document=Lengths.of(of_documents),
        tokens_per_sequence=Lengths.of(file.lengths),
        smallest_id=smallest,
        largest_id=largest,
        tokenizer=facts,
    )


def tokenizer_of(
    prefix: str | os.PathLike[str], told: TokenizerSpec | None = None
) -> tuple[TokenizerSpec, Tokenizer]:
    """Return the tokenizer to read a pair with: as told, else the one stored beside the pair.

    Raises:
        ValueError: if it is not the one that made the pair, or none is known.
    """
    facts = (read_beside(prefix) or {}).get("tokenizer") or {}
    if told is None:
        if "spec" not in facts:
            raise ValueError(
                f"{os.fspath(prefix)}: nothing beside it says which tokenizer made it. "
                "Name one: --tokenizer.kind ... --tokenizer.path ..."
            )
        told = TokenizerSpec.from_json(facts["spec"])
    tokenizer = load_tokenizer(told)
    require_same_identity(
        os.fspath(prefix), facts.get("identity"), tokenizer.identity, of="the given tokenizer"
    )
    return told, tokenizer


def decode_document(file: IndexedFile, document: int, tokenizer: Tokenizer) -> list[str]:
    """Return the text of each sequence of a document, without the end-of-document token.

    Raises:
        ValueError: if an id is outside the vocabulary.
    """
    sequences = [sequence.tolist() for sequence in file.document(document)]
    if sequences and sequences[-1] and sequences[-1][-1] == tokenizer.special.eod:
        sequences[-1].pop()
    try:
        return [tokenizer.decode(ids) for ids in sequences]
    except ValueError as error:
        raise ValueError(f"{file.prefix}.bin: document {document}: {error}") from error


def merge(
    sources: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write one pair with the documents of several in order, and say which tokenizer made it.

    Raises:
        ValueError: if the pairs come from different tokenizers, one is damaged, or the output is
            one of them or exists.
    """
    output = Path(os.fspath(output_prefix))
    if any(Path(os.fspath(source)).resolve() == output.resolve() for source in sources):
        raise ValueError(f"{output}: it is one of the pairs to merge. Name another output.")
    facts = {os.fspath(source): read_beside(source) or {} for source in sources}
    known = {source: told["tokenizer"] for source, told in facts.items() if told.get("tokenizer")}
    for source, told in known.items():
        first = next(iter(known))
        require_same_identity(source, told["identity"], known[first]["identity"], of=first)
    levels = {told["level"] for told in facts.values() if "level" in told}
    if len(levels) > 1:
        raise ValueError(
            f"{output}: pairs of documents and pairs of sentences do not merge. "
            "Merge those of one kind."
        )
    merge_pairs(sources, output_prefix, overwrite=overwrite)
    # Unknown tokenizers leave the merged pair without a claim: it would cover them too.
    if known and len(known) == len(facts):
        told = {"tokenizer": next(iter(known.values())), "level": levels.pop()}
        write_beside(output_prefix, {**told, "merged_from": list(facts)})


def export(
    prefix: str | os.PathLike[str],
    output: Path,
    *,
    tokenizer: TokenizerSpec | None = None,
    key: str = "text",
    as_ids: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a pair back as loose JSON, a document a line; return the number of documents.

    A document of one sequence is a string, of several a list of strings: preprocessing the file
    again gives the same sequences. The end-of-document token is left out.

    Args:
        prefix: of the pair.
        output: .jsonl, or compressed as its suffix says; appears when it is whole.
        tokenizer: by default the one stored beside the pair.
        key: of the JSON objects.
        as_ids: write lists of ids, end-of-document tokens included, and no text.
        workers: processes that decode.
        overwrite: replace a file of that name.
        report: called with documents done and in all.

    Raises:
        ValueError: if the pair is damaged, its tokenizer is unknown, or the output exists.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: already there. Name another file, or pass --overwrite.")
    file = IndexedFile(prefix)
    spec = None if as_ids else tokenizer_of(prefix, tokenizer)[0]
    starts = range(0, file.num_documents, _DOCUMENTS_AT_ONCE)
    work = partial(_lines_of, os.fspath(prefix), spec, key)
    with atomic_write(output) as staged, compressed_writer(output, staged.file) as stream:
        for start, lines in zip(starts, ordered_map(work, starts, workers=workers), strict=True):
            stream.write(lines)
            report(min(start + _DOCUMENTS_AT_ONCE, file.num_documents), file.num_documents)
        file.verify()
    return file.num_documents


@lru_cache(maxsize=1)
def _opened(prefix: str, spec: TokenizerSpec | None) -> tuple[IndexedFile, Tokenizer | None]:
    return IndexedFile(prefix), None if spec is None else load_tokenizer(spec)


def _lines_of(prefix: str, spec: TokenizerSpec | None, key: str, start: int) -> bytes:
    file, tokenizer = _opened(prefix, spec)
    file.verify()
    end = min(start + _DOCUMENTS_AT_ONCE, file.num_documents)
    return b"".join(_line(file, tokenizer, key, document) for document in range(start, end))


def _line(file: IndexedFile, tokenizer: Tokenizer | None, key: str, document: int) -> bytes:
    if tokenizer is None:
        value: Any = [sequence.tolist() for sequence in file.document(document)]
    else:
        texts = decode_document(file, document, tokenizer)
        value = texts[0] if len(texts) == 1 else texts
    return json.dumps({key: value}, ensure_ascii=False).encode() + b"\n"


def document_preview(
    file: IndexedFile, documents: range, tokenizer: Tokenizer
) -> Iterator[tuple[int, int, str]]:
    """Yield (document, tokens, text) of some documents."""
    for document in documents:
        texts = decode_document(file, document, tokenizer)
        yield document, sum(len(one) for one in file.document(document)), "\n".join(texts)
