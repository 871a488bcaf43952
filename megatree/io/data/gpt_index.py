"""The three index arrays that turn documents into shuffled samples, equal to Megatron's.

A document here is one sequence of the file. Epochs of shuffled documents are laid end to end (the
document index) and cut into samples that share `extra` tokens with the next (the sample index);
the shuffle index says which sample comes k-th. One random stream serves the first and the last.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from megatree.io.data import loops

_DOCUMENTS_AT_ONCE = 1 << 22  # bounds the memory of the sample index: 8 bytes each
# From this share of an epoch on, the last epoch is shuffled together with the others.
_LAST_EPOCH_SHARE = 0.80


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """How often the documents are passed over to get the samples.

    Attributes:
        num_tokens: of one epoch.
        seq: tokens of a sample.
        extra: tokens that a sample shares with the next one, 1 or 0.
        count: epochs.
        num_before_last: samples before the last epoch if that is shuffled on its own, else None.
    """

    num_tokens: int
    seq: int
    extra: int
    count: int
    num_before_last: int | None

    @property
    def num_samples(self) -> int:
        """Samples in all epochs, a partial one not counted."""
        return _whole_samples(self.count * self.num_tokens, self.seq, self.extra)


@dataclass(frozen=True, kw_only=True, eq=False)
class GPTIndex:
    """The three arrays; sample k lies between rows `shuffle[k]` and `shuffle[k] + 1` of `samples`.

    Attributes:
        documents: sequence of the file at each place of the stream of epochs.
        samples: per row a place in `documents` and a token in it, where a sample starts; the next
            row is where it ends, `extra` tokens further.
        shuffle: row of the k-th sample.
    """

    documents: Integer[np.ndarray, " num_places"]
    samples: Integer[np.ndarray, "num_rows 2"]
    shuffle: Integer[np.ndarray, " num_samples"]


def count_epochs(num_tokens: int, *, seq: int, extra: int, num_samples: int | None) -> Epochs:
    """Return the epochs that `num_samples` samples take; one epoch if that is None.

    The last epoch is shuffled on its own if it is needed for less than 80% of its samples, so that
    few documents are seen once more than the others.

    Raises:
        ValueError: samples are wanted and there is no token.
    """
    if num_samples and not num_tokens:
        raise ValueError(
            f"count_epochs: 0 tokens never make {num_samples} samples. Add documents to this split."
        )
    count = 1
    if num_samples and num_tokens:
        count = max(1, -(-(num_samples * seq + extra) // num_tokens))
    before = None
    if count > 1 and num_samples is not None:
        so_far = _whole_samples((count - 1) * num_tokens, seq, extra)
        per_epoch = _whole_samples(num_tokens, seq, extra)
        if num_samples - so_far < int(_LAST_EPOCH_SHARE * per_epoch):
            before = so_far
    return Epochs(num_tokens=num_tokens, seq=seq, extra=extra, count=count, num_before_last=before)


def build_gpt_index(
    lengths: Integer[np.ndarray, " num_sequences"],
    bounds: tuple[int, int],
    *,
    seq: int,
    num_samples: int | None,
    seed: int,
    extra: int = 1,
    keep_partial: bool = False,
) -> GPTIndex:
    """Build the arrays for sequences `bounds[0]` to `bounds[1]` of a file.

    Args:
        lengths: tokens of every sequence of the file.
        bounds: first sequence and end of the split.
        seq: tokens of a sample.
        num_samples: samples wanted; whole epochs are made, so there are usually more.
        seed: of the legacy generator of numpy, below 2**32.
        extra: tokens that a sample shares with the next, 1 or 0.
        keep_partial: keep the last sample though it may be short (Megatron's option for
            validation; the count is rounded in 32-bit floats there, and so here).

    Raises:
        ValueError: samples are wanted and the split holds no token.
    """
    # Aligned, which the file is not.
    lengths = np.require(lengths[bounds[0] : bounds[1]], np.int32, ["ALIGNED", "CONTIGUOUS"])
    epochs = count_epochs(
        int(lengths.sum(dtype=np.int64)), seq=seq, extra=extra, num_samples=num_samples
    )
    random = np.random.RandomState(seed)  # its stream is part of the format
    documents = _document_index(bounds, epochs, random)
    samples = sample_index(lengths, documents, bounds[0], epochs, keep_partial=keep_partial)
    return GPTIndex(
        documents=documents,
        samples=samples,
        shuffle=_shuffle_index(len(samples) - 1, epochs.num_before_last, random),
    )


def _whole_samples(num_tokens: int, seq: int, extra: int) -> int:
    return max(0, num_tokens - extra) // seq


def _document_index(
    bounds: tuple[int, int],
    epochs: Epochs,
    random: np.random.RandomState,
) -> np.ndarray:
    once = np.arange(*bounds, dtype=np.int32)
    together = epochs.count - (epochs.num_before_last is not None)
    out = np.tile(once, epochs.count)
    random.shuffle(out[: together * len(once)])
    if together < epochs.count:
        random.shuffle(out[together * len(once) :])
    return out


def sample_index(
    lengths: np.ndarray, documents: np.ndarray, first: int, epochs: Epochs, *, keep_partial: bool
) -> np.ndarray:
    """Find where each sample ends: a sorted search in the running sum of the lengths, or a walk.

    Every sample but the first starts where the one before it ends, less `extra` tokens, and in
    the document that holds the last of these.
    """
    seq, extra = epochs.seq, epochs.extra
    total = epochs.count * epochs.num_tokens
    num_samples = epochs.num_samples
    if keep_partial and total > extra:
        rounded = np.ceil(np.float32(total - extra) / np.float32(seq))
        num_samples = min(int(rounded), -(-(total - extra) // seq))
    longest = max(len(documents), int(lengths.max(initial=0)))
    dtype = np.int32 if longest <= np.iinfo(np.int32).max else np.int64
    out = np.zeros((num_samples + 1, 2), dtype)
    whole = num_samples == epochs.num_samples
    if whole and len(documents) >= loops.WORTH_COMPILING:
        fast = loops.compiled(loops.walk_documents)
        if fast:
            fast(lengths, documents, first, seq, extra, out)
            return out
    before, row = 0, 1
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        some = documents[start : start + _DOCUMENTS_AT_ONCE]
        ends = np.cumsum(lengths[some - first], dtype=np.int64)
        # Rows whose sample ends in these documents: sample i ends at token (i + 1) * seq + extra.
        stop = min(num_samples, max(0, before + int(ends[-1]) - extra) // seq) + 1
        at = np.arange(row, stop, dtype=np.int64) * seq + (extra - before)
        place = np.searchsorted(ends, at, side="left")
        out[row:stop, 0] = start + place
        out[row:stop, 1] = at - extra - (ends[place] - lengths[some[place] - first])
        before, row = before + int(ends[-1]), stop
    if row <= num_samples:  # the partial sample ends with the last document
        assert row == num_samples, "only the last sample may be partial"
        out[row] = len(documents) - 1, lengths[documents[-1] - first] - extra
    return out


def _shuffle_index(
    num_samples: int, num_before_last: int | None, random: np.random.RandomState
) -> np.ndarray:
    dtype = np.uint32 if num_samples < np.iinfo(np.uint32).max - 1 else np.int64
    out = np.arange(num_samples, dtype=dtype)
    if num_before_last is None:
        random.shuffle(out)
    else:
        random.shuffle(out[:num_before_last])
        random.shuffle(out[num_before_last:])
    return out
