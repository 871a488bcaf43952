"""A dataset in a drawn order, passed over as often as samples are wanted of it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from megatree.io.data.dataset import Batch, Dataset, check_ids, digest
from megatree.io.data.order import sample_ids


@dataclass(frozen=True, kw_only=True, eq=False)
class Shuffled:
    """Sample k is the k-th of the endless order of `sample_ids` over another dataset.

    A GPT dataset is shuffled in its index; packed rows, which have none, are shuffled here.

    Attributes:
        dataset: the samples.
        seed: picks the order.
        count: samples in this order; one epoch if None.
    """

    dataset: Dataset
    seed: int
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count and not len(self.dataset):
            raise ValueError(
                f"Shuffled: {self.count} samples are wanted of a dataset that has none. "
                "Add documents to this split, or ask for 0 samples."
            )

    def __len__(self) -> int:
        return len(self.dataset) if self.count is None else self.count

    @property
    def identity(self) -> str:
        """Digest of the dataset, the seed and the count."""
        return digest(
            kind="shuffled", dataset=self.dataset.identity, seed=self.seed, count=self.count
        )

    def verify(self) -> None:
        """Raise a ValueError if a file changed."""
        self.dataset.verify()

    def rows(
        self,
        ids: Integer[np.ndarray, " n"],
        columns: Integer[np.ndarray, " t"] | None = None,
    ) -> Batch:
        """Return the samples `ids`, one row each."""
        check_ids("Shuffled", ids, len(self))
        return self.dataset.rows(sample_ids(ids, len(self.dataset), seed=self.seed), columns)
