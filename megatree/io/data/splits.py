"""Cut the sequences or documents of one file into train, valid and test by a text like 949,50,1."""

import re

import numpy as np

SPLITS = ("train", "valid", "test")


def split_shares(split: str) -> tuple[tuple[float, float] | None, ...]:
    """Return (from, to) of each split as shares of the whole; None where the text gives it none.

    Missing numbers are 0. Law: the shares are adjacent and end at 1.

    Raises:
        ValueError: the text holds no numbers, more than three, a negative one, or only zeros.

    >>> split_shares("90,10")
    ((0.0, 0.9), (0.9, 1.0), None)
    """
    parts = [part.strip() for part in split.replace("/", ",").split(",")]
    if not all(re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", part) for part in parts):
        raise ValueError(
            f"split {split!r}: is not up to three numbers of 0 or more with commas between. "
            "Write it like 949,50,1."
        )
    weights = [float(part) for part in parts]
    if len(weights) > len(SPLITS) or sum(weights) <= 0:
        raise ValueError(
            f"split {split!r}: {len(weights)} numbers that sum to {sum(weights)}. "
            "Give one to three, not all zero, like 949,50,1."
        )
    weights += [0.0] * (len(SPLITS) - len(weights))
    # Each share is divided by the sum before they are added up: Megatron's rounding.
    total = sum(weights)
    ends = np.cumsum([weight / total for weight in weights])
    ends[-1 if weights[-1] else -2 if weights[-2] else 0] = 1.0
    starts = np.concatenate([[0.0], ends[:-1]])
    return tuple(
        (float(lo), float(hi)) if weight else None
        for weight, lo, hi in zip(weights, starts, ends, strict=True)
    )


def split_bounds(split: str, total: int) -> tuple[tuple[int, int] | None, ...]:
    """Return (first, end) of each split among `total` sequences; None where the text gives none.

    Law: no two overlap, and together they are everything. A split may round to nothing: (n, n).

    Raises:
        ValueError: the text is no split.

    >>> split_bounds("949,50,1", 200)
    ((0, 190), (190, 200), (200, 200))
    """
    return tuple(
        None if share is None else (round(share[0] * total), round(share[1] * total))
        for share in split_shares(split)
    )
