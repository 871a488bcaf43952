"""The global order of samples: a function of the seed and the number of consumed samples alone."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from megatree.io.data.dataset import Batch, Dataset, digest
from megatree.io.data.order import sample_ids

Columns = Integer[np.ndarray, " t"] | tuple[int, int] | None


@runtime_checkable
class Batches(Protocol):
    """What deals batches by number of consumed samples: a `Stream`, or one of your own."""

    @property
    def identity(self) -> str:
        """Digest of all that decides the samples and their order."""
        ...

    def batch(
        self, consumed: int, num_samples: int, *, rows: tuple[int, int] | None = None
    ) -> Batch:
        """Return some rows of the samples that follow the first `consumed` ones."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Deals the samples of a dataset.

    Neither the batch size nor the number of ranks shows in the order, so a run may change both and
    go on: every sample is dealt exactly once.

    Attributes:
        dataset: the samples.
        seed: None deals them as they are stored, which for GPT, BERT, T5 and blends is shuffled
            already and holds as many epochs as were asked for; it ends after the last. A number
            deals epochs without end, each in an order of its own (see `sample_ids`).
        stored_first: with a seed, deal them as they are stored the first time: Megatron's order for
            as long as Megatron has one, and then on.
    """

    dataset: Dataset
    seed: int | None = None
    stored_first: bool = False

    def __post_init__(self) -> None:
        if self.seed is not None and not len(self.dataset):
            raise ValueError("Stream: a dataset of 0 samples never ends an epoch. Add documents.")

    @property
    def identity(self) -> str:
        """Digest of the dataset and the seed; equal on all ranks of a run."""
        return digest(
            kind="stream", dataset=self.dataset.identity, seed=self.seed, stored=self.stored_first
        )

    def verify(self) -> None:
        """Raise a ValueError if a file changed."""
        self.dataset.verify()

    def batch(
        self,
        consumed: int,
        num_samples: int,
        *,
        rows: tuple[int, int] | None = None,
        columns: Columns = None,
    ) -> Batch:
        """Return the `num_samples` samples that follow the first `consumed` ones, or a part.

        Args:
            consumed: samples dealt before, over all epochs.
            num_samples: rows of the global batch, or of one microbatch.
            rows: (lo, hi) to read only these rows.
            columns: (lo, hi), or places, of the sequence: what this rank of a cut sequence needs.

        Raises:
            ValueError: a number is out of its range, or the dataset ends before.
        """
        lo, hi = (0, num_samples) if rows is None else rows
        if consumed < 0 or not 0 <= lo <= hi <= num_samples:
            raise ValueError(
                f"batch: rows ({lo}, {hi}) of {num_samples} samples after {consumed} do not "
                "exist. Use 0 <= lo <= hi <= num_samples, and count from 0."
            )
        if isinstance(columns, tuple):
            columns = np.arange(*columns)
        return self.dataset.rows(self._ids(consumed, lo, hi, num_samples), columns)

    def _ids(self, consumed: int, lo: int, hi: int, num_samples: int) -> np.ndarray:
        positions = consumed + np.arange(lo, hi)
        if self.seed is not None:
            drawn = sample_ids(positions, len(self.dataset), seed=self.seed)
            if not self.stored_first:
                return drawn
            return np.where(positions < len(self.dataset), positions, drawn)
        if consumed + num_samples > len(self.dataset):
            raise ValueError(
                f"batch: {num_samples} samples after {consumed} pass the end of a dataset of "
                f"{len(self.dataset)}. Build it for more samples, or stop earlier."
            )
        return positions
