"""Which pairs of documents to compare, given who shares a band with whom."""

from collections.abc import Iterable, Iterator
from itertools import combinations

import numpy as np

from megatree.io.corpus.bands import buckets

# In a bucket up to this size each document is compared with each. In a larger one, a document is
# compared with the first; those unlike it are tried again, as a bucket of their own.
ALL_PAIRS = 32
_MOST_ROUNDS = 32


class Search:
    """Proposes pairs of documents, round by round; `near` is told which of them are alike."""

    def __init__(self, *, hashes: np.ndarray, documents: np.ndarray) -> None:
        self.hashes = hashes
        self.documents = documents
        self.near: set[tuple[int, int]] = set()
        self.seen: set[tuple[int, int]] = set()
        self.left = 0

    def rounds(self) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of pairs to compare; before the next one, `near` must be up to date."""
        large: list[list[int]] = []
        first: list[tuple[int, int]] = []
        for band in range(self.hashes.shape[1]):
            for bucket in buckets(self.hashes[:, band]):
                members = self.documents[bucket].tolist()
                if len(members) <= ALL_PAIRS:
                    first += self._new(combinations(members, 2))
                else:
                    large.append(members)
        yield first
        for _ in range(_MOST_ROUNDS):
            if not large:
                return
            yield self._new(pair for bucket in large for pair in _star(bucket))
            rest = [[b for a, b in _star(bucket) if (a, b) not in self.near] for bucket in large]
            large = [bucket for bucket in rest if len(bucket) > 1]
        self.left = len({document for bucket in large for document in bucket})

    def _new(self, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.seen]
        self.seen.update(new)
        return new


def _star(bucket: list[int]) -> list[tuple[int, int]]:
    return [(bucket[0], other) for other in bucket[1:]]
