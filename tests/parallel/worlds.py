"""Whole values, spread over simulated ranks by type and put together again."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatree.parallel.layout import cut, spec_box
from megatree.parallel.types import I, P, R, S, ShardType, make_type


def points(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Return every rank's coordinates, row-major."""
    grid = itertools.product(*(range(n) for n in sizes.values()))
    return [dict(zip(sizes, point, strict=True)) for point in grid]


def all_types(
    sizes: Mapping[str, int], num_dims: int, *, size: int, grad: bool = True
) -> list[ShardType]:
    """Return every type of a cube over a mesh: all states, all orders of axes on a dim."""
    out: list[ShardType] = []
    states = [*range(num_dims), I, P, *([R] if grad else [])]
    for choice in itertools.product(states, repeat=len(sizes)):
        for order in itertools.permutations(sizes):
            spec: list[tuple[str, ...]] = [() for _ in range(num_dims)]
            for axis in order:
                state = choice[list(sizes).index(axis)]
                if isinstance(state, int):
                    spec[state] = (*spec[state], axis)
            kinds = {a: s for a, s in zip(sizes, choice, strict=True) if isinstance(s, str)}
            ty = make_type(
                (size,) * num_dims, torch.float64, tuple(spec), sizes, kinds=kinds, grad=grad
            )
            if ty not in out:
                out.append(ty)
    return out


def spread(
    value: Tensor, ty: ShardType, sizes: Mapping[str, int], generator: torch.Generator
) -> list[Tensor]:
    """Return every rank's local tensor of a value: slices, copies, random terms of pending sums."""
    ranks = points(sizes)
    out = [cut(value, ty.spec, sizes, at).clone() for at in ranks]
    for axis in ty.axes_in(P):
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, at in enumerate(ranks):
            groups.setdefault(tuple(n for a, n in at.items() if a != axis), []).append(rank)
        for first, *others in groups.values():
            for rank in others:
                term = torch.randn(out[rank].shape, dtype=value.dtype, generator=generator)
                out[rank] = term
                out[first] = out[first] - term
    return out


def collect(local: Sequence[Tensor], ty: ShardType, sizes: Mapping[str, int]) -> Tensor:
    """Return the global value of local tensors; all copies must agree bit for bit up to rounding."""
    ranks = points(sizes)
    copies: dict[tuple[int, ...], Tensor] = {}
    same = [axis for axis in sizes if ty.state(axis) not in (S, P)]
    for x, at in zip(local, ranks, strict=True):
        key = tuple(at[axis] for axis in same)
        whole = copies.setdefault(key, torch.zeros(ty.shape, dtype=x.dtype))
        box = spec_box(ty.spec, ty.shape, sizes, at)
        assert x.shape == ty.local_shape(sizes), f"local {tuple(x.shape)}, type {ty}"
        whole[tuple(slice(a, b) for a, b in box)] += x
    first, *others = copies.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-12, atol=1e-12)
    return first


def relative(a: Tensor, b: Tensor) -> float:
    """Return the relative L2 distance of a from b."""
    return ((a - b).norm() / b.norm().clamp_min(math.ulp(1.0))).item()
