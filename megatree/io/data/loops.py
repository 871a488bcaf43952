"""The loops of the index builders that numpy cannot take over whole, compiled where numba is there.

They are plain Python over arrays and give the same numbers as the numpy that they replace. Without
numba (extra `data`) the callers keep to numpy, and for small inputs they do so too: importing and
compiling takes seconds (once: compiled code is kept on disk).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

WORTH_COMPILING = 100_000
"""Steps of a loop from which on the compiled form is faster, its start included."""


@functools.cache
def compiled(fn: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a loop compiled, or None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    return numba.njit(cache=True)(inspect.unwrap(fn))


def most_behind(shares, dealt, limits, out, samples) -> None:
    """Fill `out` with the dataset of the largest `share * step - dealt`, the first of equals.

    Args:
        shares: float64 of each dataset.
        dealt: float64: samples dealt so far; infinite for a dataset out of the pool.
        limits: int64: samples at which a dataset leaves the pool.
        out: int16, one per step.
        samples: int64, one per step: how many of that dataset were dealt before.
    """
    for step in range(len(out)):
        at = max(step, 1)
        best, most = 0, -np.inf
        for k in range(len(shares)):
            behind = shares[k] * at - dealt[k]
            if behind > most:
                best, most = k, behind
        count = dealt[best]
        out[step], samples[step] = best, np.int64(count)
        dealt[best] = count + 1 if count + 1 < limits[best] else np.inf


def cut_documents(documents, lengths, draws, ratio, longest, fewest, too_long, start, out):
    """Cut documents into runs of sentences, some of them short by chance.

    Args:
        documents: first sentence of each document, then the end of the last.
        lengths: tokens of every sentence.
        draws: uint32: random numbers, one for a document and one more for each run.
        ratio: a run aims at fewer tokens if its draw is a multiple of this; 0 for none.
        longest: tokens that other runs aim at.
        fewest: sentences of a run; a document of fewer gives none.
        too_long: a document of several sentences with one of more tokens gives none.
        start: document to begin with.
        out: [m, 3] gets first, end, target of each run.

    Returns:
        (documents done, draws used, runs found); it stops at a document for which there may not
        be draws or room enough, without having begun it.
    """
    used, found = 0, 0
    for number in range(start, len(documents) - 1):
        first, last = np.int64(documents[number]), np.int64(documents[number + 1])
        usable = last - first >= fewest
        for sentence in range(first, last if last - first > 1 else first):
            usable &= lengths[sentence] <= too_long
        if not usable:
            continue
        most = last - first + 1
        if used + most > len(draws) or found + most > len(out):
            return number, used, found
        while True:
            draw = np.int64(draws[used])
            used += 1
            if first == last:  # one draw follows the last run, too
                break
            target = longest
            if ratio and draw % ratio == 0:
                target = 2 + draw % (longest - 1)
            end, tokens = first, 0
            while end < last and (tokens < target or end - first < fewest):
                tokens += lengths[end]
                end += 1
            if last - end <= 1:
                end = last
            out[found] = first, end, target
            found += 1
            first = end
    return len(documents) - 1, used, found


def walk_documents(lengths, documents, first, seq, extra, out) -> None:
    """Fill rows 1.. of `out` with the place and offset at which each sample of `seq` tokens ends.

    Args:
        lengths: tokens of each sequence of the split.
        documents: sequence at each place of the stream.
        first: number of the split's first sequence.
        seq: tokens of a sample.
        extra: tokens that a sample shares with the next.
        out: [rows, 2]; row 0 is (0, 0).
    """
    # Lengths are gathered some at a time: reads all over memory that do not wait for each other.
    some = np.empty(4096, np.int64)
    after, row, end = 0, 1, seq + extra
    for start in range(0, len(documents), len(some)):
        stop = min(start + len(some), len(documents))
        part = documents[start:stop]
        for i in range(len(part)):
            some[i] = lengths[np.uintp(part[i] - first)]  # unsigned: no look for negative ones
        for i in range(len(part)):
            after += some[i]
            while after >= end:
                if row == len(out):
                    return
                out[row, 0] = start + i
                out[row, 1] = end - extra - (after - some[i])
                row += 1
                end += seq


def shuffle64(order, state) -> None:
    """Shuffle from the end with a 64-bit Mersenne Twister, modulo drawn (see `mersenne`).

    Args:
        order: what to shuffle.
        state: uint64 [312], as seeded.
    """
    n, m = 312, 156
    matrix = np.uint64(0xB5026F5AA96619E9)
    upper, lower = np.uint64(0xFFFFFFFF80000000), np.uint64(0x7FFFFFFF)
    one, zero = np.uint64(1), np.uint64(0)
    at = n
    for last in range(len(order) - 1, 0, -1):
        if at == n:
            for i in range(n):
                y = (state[i] & upper) | (state[(i + 1) % n] & lower)
                mask = matrix if y & one else zero
                state[i] = state[(i + m) % n] ^ (y >> one) ^ mask
            at = 0
        x = state[at]
        at += 1
        x ^= (x >> np.uint64(29)) & np.uint64(0x5555555555555555)
        x ^= (x << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
        x ^= (x << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
        x ^= x >> np.uint64(43)
        partner = np.int64(x % np.uint64(last + 1))
        order[last], order[partner] = order[partner], order[last]
