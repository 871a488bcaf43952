"""Locality-sensitive hashing: signatures cut into bands, and who shares a whole band with whom."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

_FOUND = 0.8


def choose_bands(threshold: float, num_places: int) -> tuple[int, int]:
    """Return (bands, places per band) that find a pair at the threshold 4 times out of 5.

    A pair of similarity s shares a band with probability 1 - (1 - s^r)^b; well above the threshold
    nearly every pair does. Of the cuts that find so many, this one has the fewest pairs below.

    Args:
        threshold: similarity in (0, 1).
        num_places: of a signature.

    Raises:
        ValueError: if the threshold is no similarity between texts that differ.

    >>> choose_bands(0.7, 256)
    (32, 8)
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: {threshold} is not between 0 and 1. Use one like 0.7.")
    cuts = [(num_places // rows, rows) for rows in range(1, num_places + 1)]
    good = [(b, r) for b, r in cuts if 1 - (1 - threshold**r) ** b >= _FOUND]
    return max(good, key=lambda cut: cut[1], default=cuts[0])


def band_hashes(
    signatures: UInt32[np.ndarray, "n p"], bands: int, rows: int
) -> UInt64[np.ndarray, "n bands"]:
    """Return one number per band: equal bands have equal numbers."""
    cut = signatures[:, : bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
    found = np.zeros((len(signatures), bands), np.uint64)
    for row in range(rows):
        found = (found ^ cut[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(31)
    return found


def buckets(hashes: UInt64[np.ndarray, " n"]) -> Iterator[Int64[np.ndarray, " members"]]:
    """Yield, for one band, the documents that share its number, where there are two or more."""
    order = np.argsort(hashes, kind="stable")
    bounds = np.nonzero(np.diff(hashes[order]))[0] + 1
    for members in np.split(order, bounds):
        if len(members) > 1:
            yield members
