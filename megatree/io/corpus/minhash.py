"""Signatures of sets of shingles: two texts agree in a place with probability their similarity."""

from functools import cache

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

SHINGLE = 5  # characters
_PRIME = np.uint64(0x100000001B3)
_MOST_PROBES = 1 << 12


def shingles(text: str) -> UInt64[np.ndarray, " n"]:
    """Return the set of 5-character pieces of a text, each as a 64-bit number, rising.

    A shorter text is a piece of its own; the empty text has none.
    """
    hashes, _ = _hashed([text])
    return np.unique(hashes)


def similarity(a: UInt64[np.ndarray, " n"], b: UInt64[np.ndarray, " m"], measure: str) -> float:
    """Return the size of what two sets share over that of their union, or of one of them.

    Args:
        a: from `shingles`.
        b: from `shingles`.
        measure: "union" (Jaccard), "min" (over the smaller set), "max" (over the larger).

    >>> similarity(shingles("abcdef"), shingles("abcdeg"), "union")
    0.3333333333333333
    """
    shared = len(np.intersect1d(a, b, assume_unique=True))
    over = {"union": len(a) + len(b) - shared, "min": min(len(a), len(b))}
    size = over.get(measure, max(len(a), len(b)))
    return shared / size if size else 0.0


def signatures(texts: list[str], num_places: int) -> UInt32[np.ndarray, "texts num_places"]:
    """Return the MinHash signatures of texts.

    Each place of two signatures is equal with probability the Jaccard similarity of the sets of
    shingles. One hash per shingle fills all places: it picks a place, whose minimum counts; an
    empty place copies one that is not, the same for all texts.

    Args:
        texts: none empty.
        num_places: a power of two.

    Reference: Li, Owen, Zhang 2012 (one permutation hashing); Shrivastava 2017 (densification).
    """
    assert num_places & (num_places - 1) == 0, "a power of two"
    hashes, owner = _hashed(texts)
    place = owner * num_places + (hashes & np.uint64(num_places - 1)).astype(np.int64)
    value = (hashes >> np.uint64(32)).astype(np.uint32)
    empty = np.uint64(1) << np.uint64(32)
    found = np.full(len(texts) * num_places, empty, np.uint64)
    np.minimum.at(found, place, value.astype(np.uint64))
    table = found.reshape(len(texts), num_places)
    return _densified(table, table < empty).astype(np.uint32)


def _densified(table: np.ndarray, filled: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(~filled)
    out = table.copy()
    for probes in _probes(table.shape[1]):
        if not rows.size:
            break
        source = probes[columns]
        hit = filled[rows, source]
        out[rows[hit], columns[hit]] = table[rows[hit], source[hit]]
        rows, columns = rows[~hit], columns[~hit]
    # After thousands of misses (never seen: the chance is 2^-46 with one place filled of 128),
    # the first filled place serves.
    out[rows, columns] = table[rows, filled[rows].argmax(axis=1)]
    return out


@cache
def _probes(num_places: int) -> np.ndarray:
    """Return, for each attempt and each empty place, where to copy from."""
    number = np.arange(_MOST_PROBES * num_places, dtype=np.uint64)
    return (_mixed(number) & np.uint64(num_places - 1)).astype(np.int64).reshape(-1, num_places)


def _hashed(texts: list[str]) -> tuple[UInt64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Return a hash per shingle of each text (with repeats), and the text it is of."""
    padded = [text + "\0" * (SHINGLE - len(text)) if text else "" for text in texts]
    lengths = np.array([len(text) for text in padded], np.int64)
    points = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    size = max(len(points) - SHINGLE + 1, 0)
    rolled = np.zeros(size, np.uint64)
    for offset in range(SHINGLE):
        rolled = (rolled ^ points[offset : offset + size]) * _PRIME
        rolled ^= rolled >> np.uint64(29)
    # A window that begins in the last characters of a text reaches into the next one.
    owner = np.repeat(np.arange(len(texts)), lengths)
    ends = np.cumsum(lengths)
    inside = np.arange(size) + SHINGLE <= ends[owner[:size]]
    return _mixed(rolled[inside]), owner[:size][inside]


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (finalizer of SplitMix64, Steele et al. 2014); products wrap by intent."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
