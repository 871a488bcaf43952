"""Rows of whole sequences side by side, padded; attention and positions begin anew at each."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64, Integer

from megatree.io.data.dataset import Batch, check_ids, digest, select_columns
from megatree.io.data.packing import pack
from megatree.io.data.sequences import Sequences, read_sequences

TooLong = Literal["drop", "cut", "stop"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedDataset:
    """Samples that hold whole sequences: conversations, or documents that must not be cut.

    A sequence of n tokens takes n - 1 columns: each of its tokens but the first is a label.

    Attributes:
        tokens: the sequences.
        learned: 1 where a token is learned as a label, else 0; None learns all.
        seq: columns of a row.
        items: sequences of all rows, row by row.
        bounds: row r holds `items[bounds[r]:bounds[r + 1]]`.
        dropped: sequences that are in no row: too long, or nothing to learn.
    """

    tokens: Sequences
    learned: Sequences | None
    seq: int
    items: Int64[np.ndarray, " num_items"]
    bounds: Int64[np.ndarray, " num_bounds"]
    dropped: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def identity(self) -> str:
        """Digest of the files and of the rows."""
        return digest(
            kind="packed",
            tokens=self.tokens.identity,
            learned=self.learned.identity if self.learned else None,
            seq=self.seq,
            rows=[len(self), len(self.items), *self.bounds[:8].tolist()],
        )

    def verify(self) -> None:
        """Raise a ValueError if a file changed."""
        self.tokens.verify()
        if self.learned:
            self.learned.verify()

    def rows(
        self,
        ids: Integer[np.ndarray, " n"],
        columns: Integer[np.ndarray, " t"] | None = None,
    ) -> Batch:
        """Return `tokens`, `labels`, `weights`, `positions` and `segments` [n, seq].

        Padding is token 0 of weight 0, in a segment of its own.
        """
        check_ids("PackedDataset", ids, len(self))
        names = ("tokens", "labels", "positions", "segments")
        out: Batch = {name: np.zeros((len(ids), self.seq), np.int64) for name in names}
        out["weights"] = np.zeros((len(ids), self.seq), np.float32)
        for row, number in enumerate(ids.tolist()):
            self._fill({name: array[row] for name, array in out.items()}, number)
        return select_columns(out, columns)

    def _fill(self, row: Batch, number: int) -> None:
        items = self.items[self.bounds[number] : self.bounds[number + 1]].tolist()
        at = 0
        for segment, item in enumerate(items):
            (text,) = read_sequences(self.tokens, item, item + 1)
            width = min(len(text) - 1, self.seq)
            here = slice(at, at + width)
            row["tokens"][here], row["labels"][here] = text[:width], text[1 : width + 1]
            row["weights"][here] = self._flags(item)[1 : width + 1]
            row["segments"][here] = segment
            row["positions"][here] = np.arange(width)
            at += width
        row["segments"][at:] = len(items)

    def _flags(self, item: int) -> np.ndarray:
        if self.learned is None:
            return np.ones(int(self.tokens.lengths[item]), np.uint8)
        return read_sequences(self.learned, item, item + 1)[0]


def packed_dataset(
    tokens: Sequences,
    seq: int,
    *,
    learned: Sequences | None = None,
    packing: Literal["packed", "single"] = "packed",
    too_long: TooLong = "stop",
) -> PackedDataset:
    """Lay sequences into rows.

    Args:
        tokens: the sequences.
        seq: columns of a row.
        learned: for each token 1 if it is learned as a label, else 0; None learns all.
        packing: several sequences in a row where they fit, or one.
        too_long: what to do with a sequence of more than seq + 1 tokens: leave it out, keep its
            beginning, or refuse it.

    Raises:
        ValueError: tokens and learned differ, or a sequence is too long.
    """
    if learned is not None and not np.array_equal(tokens.lengths, learned.lengths):
        raise ValueError(
            f"{tokens.prefix} and {learned.prefix}: their sequences differ in length. "
            "Encode them again."
        )
    lengths = np.array(tokens.lengths, np.int64)
    over = lengths > seq + 1
    if over.any() and too_long == "stop":
        bad = int(np.argmax(over))
        raise ValueError(
            f"{tokens.prefix}: sequence {bad} has {lengths[bad]} tokens, and a row holds "
            f"{seq + 1}; {int(over.sum())} are too long. Drop or cut them, or raise seq."
        )
    keep = lengths > 1 if learned is None else _learns(learned, lengths, seq + 1)
    if too_long == "drop":
        keep &= ~over
    kept = np.flatnonzero(keep)
    widths = np.minimum(lengths[kept], seq + 1) - 1
    if packing == "packed":
        order, bounds = pack(widths, seq)
    else:
        order, bounds = np.arange(len(kept)), np.arange(len(kept) + 1)
    return PackedDataset(
        tokens=tokens,
        learned=learned,
        seq=seq,
        items=kept[order],
        bounds=bounds,
        dropped=len(lengths) - len(kept),
    )


def _learns(learned: Sequences, lengths: np.ndarray, longest: int) -> np.ndarray:
    """Return for each sequence whether one of its first `longest` tokens is a learned label."""
    out = np.zeros(len(lengths), bool)
    for item, length in enumerate(lengths.tolist()):
        (start,) = learned.starts(np.array([item])).tolist()
        # The first token is no label.
        places = np.arange(start + 1, start + min(length, longest))
        out[item] = learned.take(places).any()
    return out
