"""Samples of a fixed length out of documents laid end to end: what a decoder is pretrained on."""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64, Integer, Shaped

from megatree.io.data.dataset import Batch, check_ids, digest, select_columns
from megatree.io.data.fim import FillInMiddle
from megatree.io.data.gpt_index import GPTIndex
from megatree.io.data.sequences import Sequences

Restart = Literal["row", "eod", "document"]
"""Where a new piece begins: only at the row, after each eod token, or at each stored sequence."""


@dataclass(frozen=True, kw_only=True)
class GPTOptions:
    """How rows are made of tokens.

    Attributes:
        seq: tokens of a row.
        seed: of the shuffles, below 2**32.
        eod: id of the end-of-document token; needed by the options that look for it.
        pad: id that marks padding. It gets no loss and becomes id 0, in real text too: leave it
            None unless the data was padded on disk.
        positions: where positions start again from 0; the batch has `positions` unless "row".
        segments: what attention may not cross; the batch has `segments` (a number per piece of a
            row) unless "row".
        eod_loss: whether the token after an eod is learned.
        next_token: whether a sample shares one token with the next, so that its last label is a
            real one; "wrap" gives it none (Megatron's add_extra_token_to_sequence=False).
        vocab_size: ids at or above it are an error; not checked if None.
    """

    seq: int
    seed: int = 1234
    eod: int | None = None
    pad: int | None = None
    positions: Restart = "row"
    segments: Restart = "row"
    eod_loss: bool = True
    next_token: Literal["shared", "wrap"] = "shared"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.seq < 1:
            raise ValueError(f"GPTOptions: seq {self.seq} predicts nothing. Use at least 1.")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"GPTOptions: seed {self.seed} is outside [0, 2**32). Use one inside.")
        if self.eod is None and ("eod" in (self.positions, self.segments) or not self.eod_loss):
            raise ValueError(
                "GPTOptions: positions, segments or eod_loss look for the eod, which is None. "
                "Pass the tokenizer's eod."
            )

    @property
    def extra(self) -> int:
        """Tokens that a sample shares with the next one."""
        return 1 if self.next_token == "shared" else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class GPTDataset:
    """Shuffled samples of one split of one file.

    Sample k is `seq` tokens of the stream of shuffled documents, with the tokens one later as
    labels. The order, epochs included, is in the index: read samples one after the other.

    Attributes:
        source: the token sequences.
        index: where the samples are.
        options: how rows are made.
        fim: rearranges documents for infilling, where given.
        name: of the split and file, for messages.
    """

    source: Sequences
    index: GPTIndex
    options: GPTOptions
    fim: FillInMiddle | None = None
    name: str = "GPTDataset"

    def __post_init__(self) -> None:
        if self.source.dtype.kind not in "iu":
            raise ValueError(
                f"{self.source.prefix}: holds {self.source.dtype}, and token ids are integers. "
                "Name a pair of token ids."
            )

    def __len__(self) -> int:
        return len(self.index.shuffle)

    @property
    def identity(self) -> str:
        """Digest of source, options and index."""
        options = {**asdict(self.options), "fim": repr(self.fim)}
        documents = self.index.documents
        ends = [int(d) for d in (*documents[:4], *documents[-4:])]
        return digest(
            kind="gpt",
            source=self.source.identity,
            options=options,
            places=len(documents),
            samples=len(self),
            ends=ends,
        )

    def verify(self) -> None:
        """Raise a ValueError if the file changed."""
        self.source.verify()

    def rows(
        self,
        ids: Integer[np.ndarray, " n"],
        columns: Integer[np.ndarray, " t"] | None = None,
    ) -> Batch:
        """Return `tokens`, `labels`, `weights` of samples, and `positions`, `segments` by option.

        With `columns` no more tokens are read than these and their labels, unless an option looks
        at what comes before in the row.
        """
        check_ids(self.name, ids, len(self))
        parts = _Parts.of(self.source, self.index, ids, self.options)
        if columns is None or self.fim or "eod" in (self.options.positions, self.options.segments):
            return select_columns(self._make(parts, parts.all_columns, ids), columns)
        return self._make(parts, columns.astype(np.int64), ids)

    def _make(self, parts: "_Parts", columns: np.ndarray, ids: np.ndarray) -> Batch:
        options = self.options
        pad = -1 if options.pad is None else options.pad
        wanted = np.union1d(columns, columns + 1)
        text = self._read(parts, wanted[wanted < parts.width], pad)
        if self.fim:
            text = self.fim(text, ids)
        if not options.extra or wanted[-1] >= text.shape[1]:
            text = _with_column(text, wanted, parts.width, pad)
        at = np.searchsorted(wanted, columns)
        tokens, labels = text[:, at], text[:, np.searchsorted(wanted, columns + 1)]
        weights = (labels != pad).astype(np.float32)
        if not options.eod_loss:
            weights[tokens == options.eod] = 0.0
        batch = {"weights": weights, **self._pieces(tokens, parts, columns)}
        tokens[tokens == pad] = 0
        labels[labels == pad] = 0
        return {"tokens": tokens, "labels": labels, **batch}
