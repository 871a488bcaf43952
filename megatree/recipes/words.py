"""The nearest of the words that would have been right."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known word, or nothing.

    >>> did_you_mean("trian", ["train", "explain"])
    " (did you mean 'train'?)"
    """
    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
