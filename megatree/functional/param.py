"""Declarations of arrays: a leaf to learn (`Param`) and a typed input (`Array`), and their
first values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatree.functional import keys
from megatree.functional.tree import map_with_names

Box = tuple[tuple[int, int], ...]
Init = Callable[[keys.Key, Tensor], Tensor]


@dataclass(frozen=True)
class Normal:
    """Initial values: normal with mean 0 and the given standard deviation."""

    std: float

    def __call__(self, key: keys.Key, index: Tensor) -> Tensor:
        """Return initial values."""
        return keys.standard_normal(key, index) * self.std


@dataclass(frozen=True)
class Constant:
    """Initial values: all equal."""

    value: float

    def __call__(self, key: keys.Key, index: Tensor) -> Tensor:
        """Return initial values."""
        return torch.full(index.shape, self.value, dtype=torch.float64, device=index.device)


ones, zeros = Constant(1.0), Constant(0.0)


def normal(std: float) -> Normal:
    """Return an initialiser that draws from a normal distribution of standard deviation `std`."""
    return Normal(std)


def axis_names(axes: str, place: str) -> tuple[str, ...]:
    """Split "vocab embed" into names; refuse a name used twice ("_" stands for an unnamed axis)."""
    names = tuple(axes.split())
    twice = sorted({n for n in names if n != "_" and names.count(n) > 1})
    if twice:
        raise ValueError(
            f"{place}: axes {axes!r} use {', '.join(map(repr, twice))} more than once. "
            "Give every dim of an array a name of its own."
        )
    return names


@dataclass(frozen=True)
class Param:
    """A leaf to learn, declared once: shape, initial value, sharding and checkpoint follow from it.

    Args:
        axes: logical axis names, one per dim, separated by blanks ("vocab embed").
        init: initial value as a function of (key, global element index).
        dtype: dtype of the leaf; None takes the model's.
        pad: the first dim is allocated at the next multiple of this (the extra rows are zero, take
            part in nothing, and are stripped from checkpoints).
        trained: whether gradients reach it and the optimizer moves it. One that is not trained is a
            buffer of the model: kept in checkpoints, and moved after a step by what its segment
            says (`Segment.moves`).
        stack: number of layers if the first axis is "layers" (set by a Stack); `pad` then concerns
            the second dim.
    """

    axes: str
    init: Init = Normal(0.02)
    dtype: torch.dtype | None = None
    pad: int = 1
    stack: int | None = None
    trained: bool = True

    def __post_init__(self) -> None:
        axis_names(self.axes, "Param")
        if self.pad < 1:
            raise ValueError(
                f"Param({self.axes!r}): pad is {self.pad}. Give a multiple of at least 1."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The logical axis names, one per dim."""
        return tuple(self.axes.split())


@dataclass(frozen=True)
class Array:
    """A typed array: a batch entry, a constant or a carry, by logical axes and dtype.

    Args:
        axes: logical axis names, one per dim, separated by blanks.
        dtype: dtype of the array.
        shape: global shape; None derives it from a table of axis sizes.
        grad: whether a gradient flows to it.
    """

    axes: str
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] | None = None
    grad: bool = False

    def __post_init__(self) -> None:
        axis_names(self.axes, "Array")

    @property
    def names(self) -> tuple[str, ...]:
        """The logical axis names, one per dim."""
        return tuple(self.axes.split())


def logical_shape(leaf: Param | Array, sizes: Mapping[str, int], place: str) -> tuple[int, ...]:
    """Return the unpadded global shape of a leaf from the table of axis sizes."""
    if isinstance(leaf, Array) and leaf.shape is not None:
        return leaf.shape
    stack = () if isinstance(leaf, Array) or leaf.stack is None else (leaf.stack,)
    names = leaf.names[len(stack) :]
    missing = [name for name in names if name not in sizes]
    if missing:
        raise ValueError(
            f"{place}: axes {leaf.axes!r} have no size for {', '.join(map(repr, missing))}. "
            f"Add it to sizes (known: {', '.join(sorted(sizes))})."
        )
    return (*stack, *(sizes[name] for name in names))


def padded_shape(leaf: Param | Array, sizes: Mapping[str, int], place: str) -> tuple[int, ...]:
    """Return the allocated global shape: the padded dim of a Param rounded up to its `pad`."""
    shape = logical_shape(leaf, sizes, place)
    if isinstance(leaf, Array) or leaf.pad == 1:
        return shape
    dim = 0 if leaf.stack is None else 1
    return (*shape[:dim], math.ceil(shape[dim] / leaf.pad) * leaf.pad, *shape[dim + 1 :])


def stacked(tree: Any, num_layers: int) -> Any:
    """Return the Param tree of one layer with a leading "layers" axis on every leaf."""
    return map_with_names(
        lambda name, leaf: replace(leaf, axes=f"layers {leaf.axes}", stack=num_layers), tree
    )


def unstacked(tree: Any) -> Any:
    """Return the Param tree of one layer from a stacked one."""
    return map_with_names(
        lambda name, leaf: replace(leaf, axes=leaf.axes.partition(" ")[2], stack=None), tree
    )


def num_elements(tree: Any, sizes: Mapping[str, int]) -> int:
    """Count the learned elements of a Param tree, padding excluded."""
    counts: list[int] = []
    map_with_names(
        lambda name, leaf: counts.append(
            math.prod(logical_shape(leaf, sizes, name)) * leaf.trained
        ),
        tree,
    )
    return sum(counts)


def init(
    tree: Any,
    sizes: Mapping[str, int],
    seed: int,
    *,
    layout: Any = None,
    coords: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Any:
    """Allocate the first values of a Param tree, whole or one rank's shards of it.

    Law: the value of an element depends on (seed, leaf path, global index) only, so every layout
    gives the same weights.

    Args:
        tree: tree of Param.
        sizes: axis name -> global size.
        seed: any int.
        layout: what cuts the leaves; None allocates whole leaves.
        coords: the rank's coordinate on every mesh axis (needed with a layout).
        dtype: dtype of leaves that do not name one.
        device: where to allocate.

    Returns:
        A tree of tensors of the same structure.

    Raises:
        ValueError: an axis has no size, or a dim does not divide over its mesh axes.
    """

    def allocate(name: str, leaf: Param) -> Tensor:
        shape = padded_shape(leaf, sizes, name)
        whole = tuple((0, n) for n in shape)
        box = whole if layout is None else layout.box(leaf, shape, coords or {}, name)
        return initial_value(leaf, name, logical_shape(leaf, sizes, name), box, seed, dtype, device)

    return map_with_names(allocate, tree)


def initial_value(
    leaf: Param,
    name: str,
    shape: tuple[int, ...],
    box: Box,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """Return the initial values of a box of a leaf of the given logical shape; zero in the
    padding.
    """
    key = keys.fold(seed, name)
    out = torch.zeros([b - a for a, b in box], dtype=leaf.dtype or dtype, device=device)
    inside = tuple((a, max(a, min(b, n))) for (a, b), n in zip(box, shape, strict=True))
    target = out[tuple(slice(0, b - a) for a, b in inside)]
    if not inside:
        return leaf.init(key, keys.box_index((), (), device)).to(out.dtype)
    # A row block at a time: the index and its hash take 8 bytes per element each.
    row = max(1, (1 << 24) // max(1, math.prod(b - a for a, b in inside[1:])))
    for start in range(0, inside[0][1] - inside[0][0], row):
        stop = min(start + row, inside[0][1] - inside[0][0])
        rows = ((inside[0][0] + start, inside[0][0] + stop), *inside[1:])
        target[start:stop] = leaf.init(key, keys.box_index(shape, rows, device)).to(out.dtype)
    return out
