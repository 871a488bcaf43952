"""Where each token of some samples lies in the file, and where its document begins in the row."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer

from megatree.io.data.gpt_index import GPTIndex
from megatree.io.data.sequences import Sequences

NOWHERE = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Located:
    """One row per sample, one column per token.

    Attributes:
        places: of the tokens, as `Sequences.take` wants them; `NOWHERE` past the end of a sample.
        first: column at which the document of each token begins in this row.
    """

    places: Int64[np.ndarray, "n width"]
    first: Int64[np.ndarray, "n width"]


def locate(
    source: Sequences, index: GPTIndex, ids: Integer[np.ndarray, " n"], *, width: int, extra: int
) -> Located:
    """Find the tokens of samples, `extra` tokens of the next sample included, in rows of `width`.

    No token is read.
    """
    rows = index.shuffle[ids].astype(np.int64)
    begin, end = index.samples[rows].astype(np.int64), index.samples[rows + 1].astype(np.int64)
    counts = end[:, 0] - begin[:, 0] + 1
    # One entry per piece: a stretch of one document inside one row.
    row = np.repeat(np.arange(len(rows)), counts)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - begin[:, 0], counts)
    sequence = index.documents[place]
    start = np.where(place == begin[row, 0], begin[row, 1], 0)
    stop = np.where(place == end[row, 0], end[row, 1] + extra, source.lengths[sequence])
    lengths = stop - start
    ends = np.cumsum(lengths)
    before = ends - lengths
    filled = np.bincount(row, lengths, len(rows)).astype(np.int64)
    column = before - np.repeat(np.cumsum(filled) - filled, counts)
    flat = np.repeat(source.starts(sequence) + start - before, lengths) + np.arange(lengths.sum())
    first = np.repeat(column, lengths)
    if (filled == width).all():
        return Located(places=flat.reshape(-1, width), first=first.reshape(-1, width))
    there = np.arange(width) < filled[:, None]
    places = np.full(there.shape, NOWHERE)
    places[there] = flat
    firsts = np.broadcast_to(filled[:, None], there.shape).copy()  # padding is a piece of its own
    firsts[there] = first
    return Located(places=places, first=firsts)


def first_after(marks: np.ndarray) -> Int64[np.ndarray, "n width"]:
    """Return for each column the first one of its piece, when a piece ends at each mark.

    >>> first_after(np.array([[False, True, False, False]])).tolist()
    [[0, 0, 2, 2]]
    """
    starts = np.where(marks, np.arange(1, marks.shape[1] + 1), 0)[:, :-1]
    begins = np.concatenate([np.zeros((len(marks), 1), np.int64), starts], axis=1)
    return np.maximum.accumulate(begins, axis=1)


def segment_numbers(first: Int64[np.ndarray, "n width"]) -> Int64[np.ndarray, "n width"]:
    """Return the number of the piece in its row, from the column at which each piece begins.

    >>> segment_numbers(np.array([[0, 0, 2, 3]])).tolist()
    [[0, 0, 1, 2]]
    """
    steps = np.diff(first, axis=1, prepend=first[:, :1]) != 0
    return np.cumsum(steps, axis=1)
