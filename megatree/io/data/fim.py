"""Fill-in-the-middle: documents cut in three and rearranged so that the middle comes last."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Text of tokens and back, to cut between characters instead of tokens.

    Attributes:
        decode: ids -> text.
        encode: text -> ids, without special tokens.
    """

    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class FillInMiddle:
    """Rearrange each document of a row with probability `rate`; its length stays what it was.

    The three marks take three tokens, which the end of the suffix loses; a document whose suffix is
    too short stays as it is. The draws depend on the seed, the sample and its tokens alone, so
    a resumed run sees the same samples.

    Reference: Bavarian et al. 2022 (arXiv 2207.14255): modes PSM and SPM, at the context level.

    Attributes:
        prefix: id of the mark before the prefix.
        middle: id of the mark before the middle.
        suffix: id of the mark before the suffix.
        eod: id that ends a document; stays where it is.
        rate: share of documents that are rearranged.
        spm_rate: share of these in the order suffix, prefix, middle.
        seed: of the draws.
        codec: cuts between characters; between tokens if None.
    """

    prefix: int
    middle: int
    suffix: int
    eod: int
    rate: float = 0.5
    spm_rate: float = 0.5
    seed: int = 1234
    codec: Codec | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"FillInMiddle: {name} {getattr(self, name)} is no share. Use one in [0, 1]."
                )

    def describe(self) -> dict[str, object]:
        """Return all that decides the result, for a digest."""
        names = ("prefix", "middle", "suffix", "eod", "rate", "spm_rate", "seed")
        cut = "tokens" if self.codec is None else "characters"
        return {"cut": cut, **{name: getattr(self, name) for name in names}}

    def __call__(
        self, text: Int64[np.ndarray, "n width"], ids: Integer[np.ndarray, " n"]
    ) -> Int64[np.ndarray, "n width"]:
        """Return rows of tokens with documents rearranged; negative tokens are padding."""
        out = text.copy()
        for row, sample in zip(out, ids, strict=True):
            random = np.random.default_rng([self.seed, int(sample)])
            for start, stop in _documents(row, self.eod):
                if random.random() < self.rate:
                    row[start:stop] = self._rearrange(row[start:stop], random)
        return out

    def _rearrange(self, document: np.ndarray, random: np.random.Generator) -> np.ndarray:
        prefix, middle, suffix = self._cut(document, random)
        suffix_first = random.random() < self.spm_rate
        over = len(prefix) + len(middle) + len(suffix) + 3 - len(document)
        if len(suffix) < over:
            return document
        suffix = suffix[: len(suffix) - max(over, 0)]
        if suffix_first:
            marked = [self.prefix], [self.suffix], suffix, [self.middle], prefix, middle
        else:
            marked = [self.prefix], prefix, [self.suffix], suffix, [self.middle], middle
        out = np.full_like(document, -1)  # another way to spell the text may be shorter
        joined = np.concatenate([np.asarray(part, np.int64) for part in marked])
        out[: len(joined)] = joined
        return out

    def _cut(self, document: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        if self.codec is None:
            a, b = np.sort(random.integers(0, len(document) + 1, 2))
            return [document[:a], document[a:b], document[b:]]
        text = self.codec.decode(document.tolist())
        a, b = np.sort(random.integers(0, len(text) + 1, 2))
        return [
            np.array(self.codec.encode(part), np.int64) for part in (text[:a], text[a:b], text[b:])
        ]


def _documents(row: np.ndarray, eod: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each document of a row, without its eod and without padding."""
    filled = int((row >= 0).sum())
    ends = [*np.flatnonzero(row[:filled] == eod).tolist(), filled]
    start = 0
    for end in ends:
        if end > start:
            yield start, end
        start = end + 1
