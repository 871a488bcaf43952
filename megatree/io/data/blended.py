"""Several datasets dealt as one, by weights or by epochs; each may be a blend itself."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from megatree.io.data.blend_order import Rule, blend_order, exhaustive_order, normalised
from megatree.io.data.cache import IndexCache
from megatree.io.data.dataset import Batch, Dataset, check_ids, digest


@dataclass(frozen=True, kw_only=True, eq=False)
class BlendedDataset:
    """Sample k is sample `sample_index[k]` of `datasets[dataset_index[k]]`.

    Attributes:
        datasets: what is blended.
        dataset_index: which dataset each sample is of.
        sample_index: which of its samples; past the end of a dataset it begins again.
    """

    datasets: tuple[Dataset, ...]
    dataset_index: Integer[np.ndarray, " num_samples"]
    sample_index: Integer[np.ndarray, " num_samples"]

    def __len__(self) -> int:
        return len(self.dataset_index)

    @property
    def identity(self) -> str:
        """Digest of the datasets and of the order."""
        counts = np.bincount(self.dataset_index, minlength=len(self.datasets)).tolist()
        head = self.dataset_index[:1000].tolist()
        parts = [dataset.identity for dataset in self.datasets]
        return digest(kind="blend", parts=parts, counts=counts, head=head)

    def verify(self) -> None:
        """Raise a ValueError if a file changed."""
        for dataset in self.datasets:
            dataset.verify()

    def rows(
        self,
        ids: Integer[np.ndarray, " n"],
        columns: Integer[np.ndarray, " t"] | None = None,
    ) -> Batch:
        """Return the samples `ids`, one row each.

        Raises:
            ValueError: the datasets give rows of different kinds.
        """
        check_ids("BlendedDataset", ids, len(self))
        which, sample = self.dataset_index[ids], self.sample_index[ids]
        out: Batch = {}
        for k in np.unique(which).tolist():
            here = np.flatnonzero(which == k)
            part = self.datasets[k].rows(sample[here] % len(self.datasets[k]), columns)
            if not out:
                out = {
                    name: np.zeros((len(ids), *array.shape[1:]), array.dtype)
                    for name, array in part.items()
                }
            _check_alike(k, part, out)
            for name, array in part.items():
                out[name][here] = array
        return out


def _check_alike(k: int, part: Batch, out: Batch) -> None:
    shapes = {name: array.shape[1:] for name, array in part.items()}
    wanted = {name: array.shape[1:] for name, array in out.items()}
    if shapes != wanted:
        raise ValueError(
            f"BlendedDataset: dataset {k} gives {shapes} and another one {wanted}. "
            "Build all with the same options."
        )


def blend_sizes(weights: Sequence[float | int], size: int) -> list[int]:
    """Return how many samples of a blend each dataset gives; a part of a sample counts as one.

    The sum may exceed `size` by one per dataset; it is the size of the blend.

    >>> blend_sizes([3, 1], 10)
    [8, 3]
    """
    return [math.ceil(size * weight) for weight in normalised(weights)]


def blend_by_weights(
    datasets: Sequence[Dataset],
    weights: Sequence[float | int],
    size: int,
    *,
    rule: Rule = "megatron",
    cache: IndexCache | None = None,
) -> BlendedDataset:
    """Blend `size` samples in proportion to weights.

    Args:
        datasets: what to blend; each must hold the samples that the order takes of it.
        weights: one per dataset, of any sum.
        size: samples of the blend; `sum(blend_sizes(weights, wanted))` is Megatron's.
        rule: which dataset comes next; see `blend_order`.
        cache: keeps the order on disk.

    Raises:
        ValueError: weights and datasets differ in number, or a dataset is too short.
    """
    _check_counts(datasets, weights, "weights")
    # Divided twice, as in Megatron: sums of shares that are not quite 1 decide some ties.
    shares = normalised(normalised(weights))
    blended = _blend(
        datasets,
        lambda: blend_order(shares, size, rule=rule),
        {"kind": "blend 1", "shares": shares, "size": size, "rule": rule},
        cache,
    )
    taken = np.bincount(blended.dataset_index, minlength=len(datasets))
    for k, (dataset, count) in enumerate(zip(datasets, taken.tolist(), strict=True)):
        if count > len(dataset):
            raise ValueError(
                f"blend: takes {count} samples of dataset {k}, which has {len(dataset)}. "
                "Lower its weight, or build it for more samples (more epochs)."
            )
    return blended


def blend_by_epochs(
    datasets: Sequence[Dataset], epochs: Sequence[float | int], *, cache: IndexCache | None = None
) -> BlendedDataset:
    """Blend every dataset `epochs` times over, evenly spread; 1.5 deals half of it once more.

    Raises:
        ValueError: epochs and datasets differ in number, or an epoch count is negative.
    """
    _check_counts(datasets, epochs, "epochs")
    if any(not 0 <= count < math.inf for count in epochs):
        raise ValueError(
            f"blend: epochs {list(epochs)} are not counts. Use 0 or more for each dataset."
        )
    sizes = [
        math.floor(count * len(dataset)) for count, dataset in zip(epochs, datasets, strict=True)
    ]
    key = {"kind": "epochs 1", "sizes": sizes}
    return _blend(datasets, lambda: exhaustive_order(sizes), key, cache)


def _check_counts(datasets: Sequence[Dataset], values: Sequence[float | int], what: str) -> None:
    if len(datasets) != len(values) or not datasets:
        raise ValueError(
            f"blend: {len(values)} {what} for {len(datasets)} datasets. Give one for each."
        )


def _blend(
    datasets: Sequence[Dataset],
    order: Callable[[], tuple[np.ndarray, np.ndarray]],
    key: Mapping[str, Any],
    cache: IndexCache | None,
) -> BlendedDataset:
    def build() -> dict[str, np.ndarray]:
        dataset_index, sample_index = order()
        return {"dataset_index": dataset_index, "sample_index": sample_index}

    arrays = cache.get("blend", key, build) if cache else build()
    return BlendedDataset(datasets=tuple(datasets), **arrays)
