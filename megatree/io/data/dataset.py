"""What the loader needs of a dataset: numbered samples, read many at a time."""

import hashlib
import json
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, Shaped

Batch = dict[str, np.ndarray]
"""Arrays of one row per sample: `tokens`, `labels` (int64), `weights` (float32), and others."""


@runtime_checkable
class Dataset(Protocol):
    """Samples 0 to len - 1, each the same whoever reads it and whenever."""

    def __len__(self) -> int: ...

    @property
    def identity(self) -> str:
        """Digest of all that decides the samples; equal on all ranks of a run."""
        ...

    def rows(
        self,
        ids: Integer[np.ndarray, " n"],
        columns: Integer[np.ndarray, " t"] | None = None,
    ) -> Batch:
        """Return the samples `ids`, one row each; only some columns of a sequence if given."""
        ...

    def verify(self) -> None:
        """Raise a ValueError if a file under the samples changed."""
        ...


def digest(**parts: Any) -> str:
    """Return a digest of values that JSON can hold, by name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_ids(name: str, ids: Integer[np.ndarray, " n"], size: int) -> None:
    """Refuse samples that are not there.

    Raises:
        IndexError: an id is outside 0 to size - 1.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(
            f"{name}: sample {bad} is not one of {size}. Build the dataset for more samples."
        )


def select_columns(
    batch: dict[str, Shaped[np.ndarray, "n seq"]], columns: Integer[np.ndarray, " t"] | None
) -> Batch:
    """Return some columns of every array."""
    if columns is None:
        return batch
    return {name: np.ascontiguousarray(array[:, columns]) for name, array in batch.items()}
