"""Choose which words of a sample to hide: n-grams of random size, up to a share of the tokens.

Draws and their order are Megatron's, so that samples are equal for the same seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

_GEOMETRIC = 0.2  # the chance that a span ends after a word (Joshi et al. 2020, SpanBERT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Masking:
    """How words are hidden.

    Attributes:
        probability: share of the tokens to hide.
        max_ngram: most words hidden together.
        ngrams: chance of n words: falling as 1/n, the same reversed, or geometric.
        continues: for each id whether it continues a word ("##ing"), so that whole words are
            hidden; None hides single tokens.
    """

    probability: float = 0.15
    max_ngram: int = 3
    ngrams: Literal["short", "long", "geometric"] = "short"
    continues: Bool[np.ndarray, " vocab"] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1 or self.max_ngram < 1:
            raise ValueError(
                f"Masking: probability {self.probability} and max_ngram {self.max_ngram} hide "
                "nothing or all. Use a share between 0 and 1, and at least 1 word."
            )

    def describe(self) -> dict[str, object]:
        """Return all that decides the result, for a digest."""
        words = None if self.continues is None else np.packbits(self.continues).tobytes().hex()
        return {
            "probability": self.probability,
            "max_ngram": self.max_ngram,
            "ngrams": self.ngrams,
            "continues": words,
        }


def choose_spans(
    tokens: Int64[np.ndarray, " n"],
    masking: Masking,
    *,
    target: int,
    special: tuple[int, ...],
    random: np.random.RandomState,
    hide: Callable[[int], None] = lambda position: None,
) -> list[list[int]]:
    """Return the positions of each hidden n-gram, in the order of the text.

    Args:
        tokens: of the sample.
        masking: how words are hidden.
        target: tokens that the sample was meant to have.
        special: ids that are never hidden.
        random: the sample's own generator.
        hide: called for each hidden position when it is chosen; it may draw.
    """
    words = _words(tokens, masking.continues, special)
    budget = min(masking.probability * target, max(1, round(len(tokens) * masking.probability)))
    order = np.arange(len(words))
    random.shuffle(order)
    draw = _ngram_drawer(masking, random)
    hidden: set[int] = set()
    spans = []
    for word in order.tolist():
        if len(hidden) >= budget:
            break
        span = _largest_that_fits(words, word, draw(), budget - len(hidden))
        if not span or not hidden.isdisjoint(span):
            continue
        hidden.update(span)
        for position in span:
            hide(position)
        spans.append(span)
    return sorted(spans)


def _largest_that_fits(
    words: list[list[int]], word: int, size: int, budget: float | int
) -> list[int] | None:
    for n in range(size, 0, -1):
        span = [position for part in words[word : word + n] for position in part]
        if len(span) <= budget:
            return span
    return None


def _words(
    tokens: np.ndarray, continues: np.ndarray | None, special: tuple[int, ...]
) -> list[list[int]]:
    """Return the positions of each word, without special tokens.

    A continuation joins the word before it even across a special token: a text cut in front may
    begin with one.
    """
    words: list[list[int]] = []
    for at, token in enumerate(tokens.tolist()):
        if token in special:
            continue
        if words and continues is not None and continues[token]:
            words[-1].append(at)
        else:
            words.append([at])
    return words


def _ngram_drawer(masking: Masking, random: np.random.RandomState) -> Callable[[], int]:
    largest = masking.max_ngram
    if masking.ngrams == "geometric":
        return lambda: min(int(random.geometric(_GEOMETRIC)), largest)
    chances = 1.0 / (np.arange(largest) + 1)
    chances = chances / chances.sum()
    if masking.ngrams == "long":
        chances = chances[::-1]
    chances = chances / chances.sum()
    # `RandomState.choice` with probabilities, less its checks at every call.
    ends = chances.cumsum()
    ends /= ends[-1]
    return lambda: int(ends.searchsorted(random.random_sample(), side="right")) + 1
