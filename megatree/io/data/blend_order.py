"""In which order the samples of several datasets are dealt, so that every prefix has the shares.

`megatron` is Megatron's rule: at each step the dataset that lags most behind its share. None is
ever a whole sample ahead of it, but with three or more datasets one may lag by more than a sample.
`quota` keeps every dataset within one sample of its share at any prefix.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int16, Int64

from megatree.io.data import loops

Rule = Literal["megatron", "quota"]
_STEPS_AT_ONCE = 1 << 12


def normalised(weights: Sequence[float | int]) -> list[float]:
    """Return weights divided by their sum.

    Raises:
        ValueError: one is negative or no number, or all are zero.
    """
    array = np.array(weights, np.float64)
    if not len(array) or not np.isfinite(array).all() or array.min() < 0 or array.sum() <= 0:
        raise ValueError(
            f"blend: weights {list(weights)} are not shares. Give each dataset a number of 0 or "
            "more, and one of them more than 0."
        )
    return (array / array.sum()).tolist()


def blend_order(
    weights: Sequence[float | int], size: int, *, rule: Rule = "megatron"
) -> tuple[Int16[np.ndarray, " size"], Int64[np.ndarray, " size"]]:
    """Return (dataset, sample of that dataset) at each of `size` steps.

    Args:
        weights: share of each dataset; they sum to 1.
        size: steps.
        rule: which dataset comes next.

    Reference: `quota` is the quota method of Balinski and Young 1975.

    >>> blend_order([0.75, 0.25], 4)[0].tolist()
    [0, 1, 0, 0]
    """
    _check_count(len(weights))
    if rule == "quota":
        return _with_samples(_quota(weights, size), len(weights))
    # Rounding can make a share of nothing look as if it lagged.
    return _most_behind(weights, [size if weight else 0 for weight in weights], size)


def exhaustive_order(
    sizes: Sequence[int],
) -> tuple[Int16[np.ndarray, " total"], Int64[np.ndarray, " total"]]:
    """Return (dataset, sample) at each step until every dataset has dealt all of its samples.

    >>> exhaustive_order([2, 1])[0].tolist()
    [0, 1, 0]
    """
    _check_count(len(sizes))
    total = sum(sizes)
    weights = [size / total for size in sizes] if total else [0.0] * len(sizes)
    return _most_behind(weights, sizes, total)


def _check_count(count: int) -> None:
    if count > np.iinfo(np.int16).max:
        raise ValueError(
            f"blend: {count} datasets are more than the {np.iinfo(np.int16).max} that an order "
            "can number. Merge some files."
        )


def _most_behind(
    weights: Sequence[float | int], limits: Sequence[int], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Deal the dataset with the largest `weight * step - dealt`, the first of equals."""
    out = np.empty(size, np.int16)
    shares = np.array(weights, np.float64)
    dealt = np.where(np.array(limits) > 0, 0.0, np.inf)
    if size >= loops.WORTH_COMPILING and (fast := loops.compiled(loops.most_behind)):
        samples = np.empty(size, np.int64)
        fast(shares, dealt, np.array(limits, np.int64), out, samples)
        return out, samples
    behind = np.empty_like(shares)
    for start in range(0, size, _STEPS_AT_ONCE):
        steps = np.arange(start, min(start + _STEPS_AT_ONCE, size))
        chosen = []
        for due in np.maximum(steps, 1)[:, None] * shares:
            np.subtract(due, dealt, behind)
            k = int(behind.argmax())
            dealt[k] += 1
            if dealt[k] >= limits[k]:
                dealt[k] = np.inf  # leaves the pool
            chosen.append(k)
        out[start : start + len(chosen)] = chosen
    return _with_samples(out, len(weights))


def _quota(weights: Sequence[float | int], size: int) -> np.ndarray:
    """Deal, of the datasets below their share at this step, the one with most weight per sample."""
    out = np.empty(size, np.int16)
    shares = np.array(weights, np.float64)
    per_sample = shares.copy()  # weight / (dealt + 1)
    dealt = np.zeros(len(shares))
    due, below, score = np.empty_like(shares), np.empty(len(shares), bool), np.empty_like(shares)
    for step in range(size):
        np.multiply(shares, step + 1, due)
        np.less(dealt, due, below)
        np.multiply(per_sample, below, score)
        k = int(score.argmax())
        dealt[k] += 1
        per_sample[k] = shares[k] / (dealt[k] + 1)
        out[step] = k
    return out


def _with_samples(chosen: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the samples of each dataset in the order in which they are dealt."""
    samples = np.empty(len(chosen), np.int64)
    order = np.argsort(chosen, kind="stable")
    ends = np.cumsum(np.bincount(chosen, minlength=count))
    samples[order] = np.arange(len(chosen)) - np.repeat(
        np.concatenate([[0], ends[:-1]]), np.diff(ends, prepend=0)
    )
    return chosen, samples
