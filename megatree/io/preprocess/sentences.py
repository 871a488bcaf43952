"""Split a text into sentences with punkt, from data shipped with the package or given by path."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from megatree.io.optional import optional

# As Megatron cuts: the work of punkt on one piece is bounded, and the sentences are the same.
PIECE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SentenceSplitter:
    """Finds where sentences end.

    Attributes:
        data: folder with the four files of a punkt model (one language of nltk's punkt_tab);
            None for the English one in the package.
        keep_newlines: leave the white space after a sentence in it.
    """

    data: Path | None = None
    keep_newlines: bool = False

    @cached_property
    def _punkt(self) -> Any:
        punkt = optional("nltk.tokenize.punkt", extra="data", purpose="split-sentences")
        folder = self.data or resources.files("megatree.io.preprocess") / "punkt_english"
        params = punkt.PunktParameters()
        params.abbrev_types = set(_lines(folder, "abbrev_types.txt"))
        params.sent_starters = set(_lines(folder, "sent_starters.txt"))
        params.collocations = {
            tuple(line.split("\t")) for line in _lines(folder, "collocations.tab")
        }
        counts = (line.split("\t") for line in _lines(folder, "ortho_context.tab"))
        params.ortho_context = defaultdict(int, {word: int(flags) for word, flags in counts})
        return punkt.PunktSentenceTokenizer(params)

    def split(self, text: str) -> list[str]:
        """Return the sentences of a text in order; white space between them is dropped."""
        found: list[str] = []
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            spans = list(self._punkt.span_tokenize(piece))
            ends = [*(begin for begin, _ in spans[1:]), len(piece)]
            for (begin, end), following in zip(spans, ends, strict=True):
                found.append(piece[begin : following if self.keep_newlines else end])
        return found


def _lines(folder: Path | Traversable, name: str) -> list[str]:
    file = folder / name
    try:
        return [line for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder}: it has no {name}. Name a folder of punkt data (in nltk's data: "
            "tokenizers/punkt_tab/LANGUAGE)."
        ) from error
