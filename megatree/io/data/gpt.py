"""Samples of a fixed length out of documents laid end to end: what a decoder is pretrained on."""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Integer

from megatree.io.data.cache import IndexCache
from megatree.io.data.dataset import Batch, check_ids, digest, select_columns
from megatree.io.data.fim import FillInMiddle
from megatree.io.data.gpt_index import GPTIndex, build_gpt_index, count_epochs
from megatree.io.data.locate import NOWHERE, first_after, locate, segment_numbers
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
        options = {**asdict(self.options), "fim": self.fim.describe() if self.fim else None}
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
        seq, options = self.options.seq, self.options
        located = locate(self.source, self.index, ids, width=seq + 1, extra=options.extra)
        looks_back = self.fim or "eod" in (options.positions, options.segments)
        if columns is None or looks_back:
            text = self._read(located.places)
            if self.fim:
                text = self.fim(text, ids)
            batch = self._batch(text[:, :-1].copy(), text[:, 1:].copy(), located.first[:, :-1])
            return select_columns(batch, columns)
        # One read of what the two shifted views have in common.
        read = np.union1d(columns, columns + 1)
        text = self._read(located.places[:, read])
        tokens = text[:, np.searchsorted(read, columns)]
        labels = text[:, np.searchsorted(read, columns + 1)]
        return self._batch(tokens, labels, located.first[:, :-1], columns)

    def _batch(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        first: np.ndarray,
        columns: np.ndarray | None = None,
    ) -> Batch:
        """Return all entries; `first` holds whole rows, tokens and labels only `columns`."""
        options = self.options
        hidden = self._padding(labels)
        weights = np.subtract(1.0, hidden, dtype=np.float32)
        if not options.eod_loss:
            weights[tokens == options.eod] = 0.0
        batch = {"tokens": tokens, "labels": labels, "weights": weights}
        firsts = {"document": first}
        if "eod" in (options.positions, options.segments):
            firsts["eod"] = first_after(tokens == options.eod)
        if options.positions != "row":
            first = firsts[options.positions]
            positions = np.arange(first.shape[1]) - first
            batch["positions"] = positions if columns is None else positions[:, columns]
        if options.segments != "row":
            segments = segment_numbers(firsts[options.segments])
            batch["segments"] = segments if columns is None else segments[:, columns]
        tokens[self._padding(tokens)] = 0
        labels[hidden] = 0
        return batch

    def _padding(self, tokens: np.ndarray) -> np.ndarray:
        hidden = tokens < 0
        return hidden if self.options.pad is None else hidden | (tokens == self.options.pad)

    def _read(self, places: np.ndarray) -> np.ndarray:
        """Return the tokens at places [n, width] as int64, -1 where there is none."""
        tokens = self.source.take(np.maximum(places, 0)).astype(np.int64)
        vocab = self.options.vocab_size
        if vocab is not None and tokens.size and not (0 <= tokens.min() <= tokens.max() < vocab):
            self._refuse(places, tokens, vocab)
        tokens[places == NOWHERE] = -1
        return tokens

    def _refuse(self, places: np.ndarray, tokens: np.ndarray, vocab: int) -> None:
        bad = np.argmax((tokens < 0) | (tokens >= vocab))
        ends = self.source.starts(np.arange(len(self.source.lengths))) + self.source.lengths
        sequence = int(np.searchsorted(ends, places.flat[bad], side="right"))
        raise ValueError(
            f"{self.source.prefix}: sequence {sequence} holds token {tokens.flat[bad]}, and the "
            f"vocabulary has {vocab}. Use the tokenizer that the data was made with."
        )


def gpt_dataset(
    source: Sequences,
    bounds: tuple[int, int],
    options: GPTOptions,
    *,
    num_samples: int | None,
    keep_partial: bool = False,
    fim: FillInMiddle | None = None,
    cache: IndexCache | None = None,
) -> GPTDataset:
    """Build, or find in the cache, the index of a split and return its samples.

    Args:
        source: token sequences; each is a document here.
        bounds: first sequence and end of the split.
        options: how rows are made.
        num_samples: samples wanted; there will be whole epochs of them. None: one epoch.
        keep_partial: keep the last sample though it may be short.
        fim: rearranges documents for infilling.
        cache: keeps the index on disk; without, every process builds its own.

    Raises:
        ValueError: samples are wanted and the split is empty, or the data cannot be used.
    """

    def build() -> dict[str, np.ndarray]:
        index = build_gpt_index(
            source.lengths,
            bounds,
            seq=options.seq,
            num_samples=num_samples,
            seed=options.seed,
            extra=options.extra,
            keep_partial=keep_partial,
        )
        return {"documents": index.documents, "samples": index.samples, "shuffle": index.shuffle}

    name = f"{source.prefix}[{bounds[0]}:{bounds[1]}]"
    if num_samples and bounds[0] == bounds[1]:
        raise ValueError(
            f"{name}: 0 sequences never make {num_samples} samples. Give the split a larger share, "
            "or ask for 0 samples."
        )
    epochs = count_epochs(
        int(source.lengths[slice(*bounds)].sum(dtype=np.int64)),
        seq=options.seq,
        extra=options.extra,
        num_samples=num_samples,
    )
    key = {
        "kind": "gpt 2",
        "source": source.identity,
        "bounds": bounds,
        "seq": options.seq,
        # All that the number of samples decides: runs of like length share an index.
        "epochs": [epochs.count, epochs.num_before_last],
        "seed": options.seed,
        "extra": options.extra,
        "keep_partial": keep_partial,
    }
    arrays = cache.get(name, key, build) if cache else build()
    return GPTDataset(source=source, index=GPTIndex(**arrays), options=options, fim=fim, name=name)
