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
        boundaries: whether the batch has `positions` and `segments`. Rows of one sequence need
            neither: what follows it is padding, which a causal model does not see.
        vocab_size: ids at or above it are an error; not checked if None.
    """

    tokens: Sequences
    learned: Sequences | None
    seq: int
    items: Int64[np.ndarray, " num_items"]
    bounds: Int64[np.ndarray, " num_bounds"]
    dropped: int
    boundaries: bool = True
    vocab_size: int | None = None

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
            items=[*self.items[:8].tolist(), *self.items[-8:].tolist()],
            boundaries=self.boundaries,
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
        """Return `tokens`, `labels`, `weights`, by option `positions` and `segments` [n, seq].

        Padding is token 0 of weight 0, in a segment of its own.
        """
        check_ids("PackedDataset", ids, len(self))
        names = ("tokens", "labels", "positions", "segments")
        out: Batch = {name: np.zeros((len(ids), self.seq), np.int64) for name in names}
        out["weights"] = np.zeros((len(ids), self.seq), np.float32)
        for row, number in enumerate(ids.tolist()):
            self._fill({name: array[row] for name, array in out.items()}, number)
        if not self.boundaries:
            del out["positions"], out["segments"]
        return select_columns(out, columns)

    def _fill(self, row: Batch, number: int) -> None:
        items = self.items[self.bounds[number] : self.bounds[number + 1]].tolist()
        at = 0
        for segment, item in enumerate(items):
            (text,) = read_sequences(self.tokens, item, item + 1)
            if self.vocab_size is not None and not 0 <= text.min() <= text.max() < self.vocab_size:
                bad = text[np.argmax((text < 0) | (text >= self.vocab_size))]
                raise ValueError(
                    f"{self.tokens.prefix}: sequence {item} holds token {bad}, and the vocabulary "
                    f"has {self.vocab_size}. Use the tokenizer that the data was made with."
                )
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
    bounds: tuple[int, int] | None = None,
    learned: Sequences | None = None,
    packing: Literal["packed", "single"] = "packed",
    too_long: TooLong = "stop",
    vocab_size: int | None = None,
) -> PackedDataset:
    """Lay sequences into rows.

    Args:
        tokens: the sequences.
        seq: columns of a row.
        bounds: first sequence and end of those to take; all by default.
        learned: for each token 1 if it is learned as a label, else 0; None learns all.
        packing: several sequences in a row where they fit, or one.
        too_long: what to do with a sequence of more than seq + 1 tokens: leave it out, keep its
            beginning, or refuse it.
        vocab_size: ids at or above it are an error when they are read; not checked if None.

    Raises:
        ValueError: tokens and learned differ, or a sequence is too long.
    """
    if learned is not None and not np.array_equal(tokens.lengths, learned.lengths):
        raise ValueError(
            f"{tokens.prefix} and {learned.prefix}: their sequences differ in length. "
            "Encode them again."
        )
    lengths = np.array(tokens.lengths, np.int64)
    first, end = (0, len(lengths)) if bounds is None else bounds
    outside = np.ones(len(lengths), bool)
    outside[first:end] = False
    over = (lengths > seq + 1) & ~outside
    if over.any() and too_long == "stop":
        bad = int(np.argmax(over))
        raise ValueError(
            f"{tokens.prefix}: sequence {bad} has {lengths[bad]} tokens, and a row holds "
            f"{seq + 1}; {int(over.sum())} are too long. Drop or cut them, or raise seq."
        )
    keep = lengths > 1 if learned is None else _learns(learned, lengths, seq + 1)
    keep &= ~outside
    if too_long == "drop":
        keep &= ~over
    kept = np.flatnonzero(keep)
    widths = np.minimum(lengths[kept], seq + 1) - 1
    if packing == "packed":
        order, rows = pack(widths, seq)
    else:
        order, rows = np.arange(len(kept)), np.arange(len(kept) + 1)
    return PackedDataset(
        tokens=tokens,
        learned=learned,
        seq=seq,
        items=kept[order],
        bounds=rows,
        dropped=end - first - len(kept),
        boundaries=packing == "packed",
        vocab_size=vocab_size,
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
