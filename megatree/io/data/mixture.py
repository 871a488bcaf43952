"""A tree of corpora, and how the samples of a split are shared out over it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from megatree.io.data.blend_order import Rule
from megatree.io.data.blended import blend_by_epochs, blend_by_weights, blend_sizes
from megatree.io.data.cache import IndexCache
from megatree.io.data.dataset import Dataset
from megatree.io.data.splits import SPLITS

# Datasets of a blend are built a little larger than their share, as in Megatron.
_SURPLUS = 1.005

Leaf: TypeAlias = "Callable[[Corpus, int, int | None], Dataset | None]"
"""(corpus, number of the split, samples or None for an epoch) -> dataset, None without a share."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One file of token sequences.

    Attributes:
        prefix: its path without `.bin` or `.idx`.
        split: shares of train, valid and test, like 949,50,1.
    """

    prefix: str
    split: str = "969,30,1"


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Several corpora or blends dealt as one.

    Attributes:
        parts: what is blended.
        weights: share of the samples of each part; or
        epochs: how often each part is passed over. With neither, each is passed over once, or
            gives what its length weighs if a number of samples is wanted.
        rule: which part comes next; see `blend_order`.
    """

    parts: "tuple[Corpus | Blend, ...]"
    weights: tuple[float | int, ...] | None = None
    epochs: tuple[float | int, ...] | None = None
    rule: Rule = "megatron"

    def __post_init__(self) -> None:
        for name in ("weights", "epochs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.parts):
                raise ValueError(
                    f"Blend: {len(values)} {name} for {len(self.parts)} parts. Give one for each."
                )
        if not self.parts or (self.weights is not None and self.epochs is not None):
            raise ValueError(
                f"Blend: {len(self.parts)} parts, with weights and epochs. "
                "Give at least one part, and weights or epochs or neither."
            )


Data: TypeAlias = Corpus | Blend | Sequence[Corpus | Blend | None]
"""One corpus or blend that is split, or one for each split, used whole."""
NumSamples: TypeAlias = tuple[int | None, int | None, int | None]
Splits: TypeAlias = tuple[Dataset | None, Dataset | None, Dataset | None]


def build_splits(
    data: Data, leaf: Leaf, num_samples: NumSamples, cache: IndexCache | None
) -> Splits:
    """Build the datasets of train, valid and test.

    Args:
        data: what they are made of.
        leaf: makes the dataset of one corpus.
        num_samples: wanted of each split. None: one epoch; a blend by weights needs a number.
        cache: keeps the orders of blends on disk.

    Returns:
        A dataset, or None where the split has no share.

    Raises:
        ValueError: samples are wanted of a split that holds none.
    """
    one = isinstance(data, Corpus | Blend)
    each = [data] * len(SPLITS) if one else [_whole(part, i) for i, part in enumerate(data)]
    train, valid, test = (
        None if part is None else _build(part, i, wanted, leaf, cache)
        for i, (part, wanted) in enumerate(zip(each, num_samples, strict=True))
    )
    return train, valid, test


def _whole(data: Corpus | Blend | None, split: int) -> Corpus | Blend | None:
    """Give all of the data to one split."""
    if isinstance(data, Corpus):
        return replace(data, split=",".join("1" if i == split else "0" for i in range(3)))
    if isinstance(data, Blend):
        parts = [_whole(part, split) for part in data.parts]
        return replace(data, parts=tuple(part for part in parts if part is not None))
    return None


def _build(
    data: Corpus | Blend, split: int, wanted: int | None, leaf: Leaf, cache: IndexCache | None
) -> Dataset | None:
    if isinstance(data, Corpus):
        return leaf(data, split, wanted)
    if data.weights is not None:
        return _by_weights(data, data.weights, split, wanted, leaf, cache)
    parts = [_build(part, split, None, leaf, cache) for part in data.parts]
    there = [(i, part) for i, part in enumerate(parts) if part is not None]
    if not there:
        return None
    datasets = [part for _, part in there]
    if data.epochs is not None or wanted is None:
        epochs = data.epochs or (1.0,) * len(parts)
        return blend_by_epochs(datasets, [epochs[i] for i, _ in there], cache=cache)
    lengths = [len(dataset) for dataset in datasets]
    if not sum(lengths) and wanted:
        raise ValueError(
            f"Blend: the {SPLITS[split]} splits of {len(datasets)} parts hold no sample, and "
            f"{wanted} are wanted. Give them larger shares, or ask for 0 samples."
        )
    if not wanted:
        return blend_by_epochs(datasets, [0.0] * len(datasets), cache=cache)
    size = min(wanted, sum(lengths))
    return blend_by_weights(datasets, lengths, size, rule=data.rule, cache=cache)


def _by_weights(
    data: Blend,
    weights: Sequence[float | int],
    split: int,
    wanted: int | None,
    leaf: Leaf,
    cache: IndexCache | None,
) -> Dataset | None:
    if wanted is None:
        raise ValueError(
            f"Blend: weights do not say how many samples {SPLITS[split]} has. "
            "Ask for a number, or blend by epochs."
        )
    if not wanted:
        return None
    sizes = blend_sizes(weights, wanted)
    parts = [
        _build(part, split, math.ceil(size * _SURPLUS), leaf, cache)
        for part, size in zip(data.parts, sizes, strict=True)
    ]
    there = [(part, w) for part, w in zip(parts, weights, strict=True) if part is not None]
    datasets, shares = [part for part, _ in there], [weight for _, weight in there]
    return blend_by_weights(datasets, shares, sum(sizes), rule=data.rule, cache=cache)
