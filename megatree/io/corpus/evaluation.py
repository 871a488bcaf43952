"""The word n-grams of evaluation sets, to look for in training text."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from megatree.io.preprocess.blocks import MAX_LINE_BYTES, BadLine, Block, read_blocks
from megatree.io.preprocess.compressed import plain_suffix
from megatree.io.preprocess.records import (
    RecordError,
    numbered_lines,
    parse_line,
    text_records,
    texts_of,
)

Gram = tuple[str, ...]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """N-grams of words, lower case, without punctuation.

    Attributes:
        grams: to look for.
        texts: evaluation texts they come from.
        too_short: texts with fewer words than are looked for.
    """

    grams: frozenset[Gram]
    texts: int = 0
    too_short: int = 0

    @staticmethod
    def read(
        paths: Sequence[Path], keys: Sequence[str], *, num_words: int = 13, min_words: int = 8
    ) -> "Evaluations":
        """Return the n-grams of evaluation files: loose JSON (.jsonl), or plain text by paragraph.

        Args:
            paths: the files.
            keys: of the JSON objects; each that an object has is a text.
            num_words: n.
            min_words: a text with fewer words than n, but at least as many, is looked for whole.

        Raises:
            ValueError: if a file cannot be read, or has no text under any key.
        """
        if not 1 <= min_words <= num_words:
            raise ValueError(
                f"min-words: {min_words} is not from 1 to num-words, {num_words}. "
                "Use 8 and 13, for example."
            )
        grams: set[Gram] = set()
        texts = too_short = 0
        for path in paths:
            before = texts
            for text in _texts(path, keys):
                found = words(text)
                texts += 1
                if len(found) < min_words:
                    too_short += 1
                    continue
                length = min(num_words, len(found))
                grams.update(
                    tuple(found[at : at + length]) for at in range(len(found) - length + 1)
                )
            if texts == before:
                raise ValueError(
                    f"{path}: it holds no text under {', '.join(keys)}. Name its keys."
                )
        return Evaluations(grams=frozenset(grams), texts=texts, too_short=too_short)

    @cached_property
    def _by_start(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """First two words -> lengths of the n-grams that begin so."""
        lengths: dict[tuple[str, str], set[int]] = {}
        for gram in self.grams:
            lengths.setdefault((gram[0], gram[1] if len(gram) > 1 else ""), set()).add(len(gram))
        return {start: tuple(sorted(found)) for start, found in lengths.items()}

    def matches(self, text: str) -> Iterator[tuple[int, int, Gram]]:
        """Yield (start, end, n-gram) of each place of a text that holds one, in order."""
        spans = [match.span() for match in _WORD.finditer(text)]
        found = [text[start:end].lower() for start, end in spans]
        by_start, grams = self._by_start, self.grams
        for at, pair in enumerate(pairwise([*found, ""])):
            for length in by_start.get(pair) or by_start.get((pair[0], "")) or ():
                gram = tuple(found[at : at + length])
                if gram in grams:
                    yield spans[at][0], spans[at + length - 1][1], gram


def words(text: str) -> list[str]:
    """Return the words of a text, lower case.

    >>> words("It's 5 o'clock.")
    ['it', 's', '5', 'o', 'clock']
    """
    return [word.lower() for word in _WORD.findall(text)]


def _texts(path: Path, keys: Sequence[str]) -> Iterator[str]:
    plain = plain_suffix(path) in (".txt", ".text", ".tokens")
    for block in read_blocks(path, unit="paragraph" if plain else "line"):
        if isinstance(block, BadLine):
            raise ValueError(f"{block}. Give a file of shorter lines.")
        yield from _paragraphs(block) if plain else _values(block, keys)


def _paragraphs(block: Block) -> Iterator[str]:
    for record in text_records(block, "text", "paragraph", max_line_bytes=MAX_LINE_BYTES):
        if isinstance(record, BadLine):
            raise ValueError(f"{record}. Mend the file.")
        yield from record[1]["text"]


def _values(block: Block, keys: Sequence[str]) -> Iterator[str]:
    for line, raw in numbered_lines(block):
        try:
            record = parse_line(raw)
            # Sets differ in their keys, and the objects of one set do too.
            texts = texts_of(record, [key for key in keys if key in record])
        except RecordError as bad:
            raise ValueError(f"{block.file}:{line}: {bad.detail}. Mend the file.") from bad
        yield from (text for some in texts.values() for text in some)
