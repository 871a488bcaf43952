"""From every rank's local tensors back to the whole value, checking that copies agree."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatree.parallel.layout import spec_box
from megatree.parallel.threads import SimulationError
from megatree.parallel.types import P, S, ShardType


def points(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Return every rank's coordinates, row-major."""
    grid = itertools.product(*(range(n) for n in sizes.values()))
    return [dict(zip(sizes, point, strict=True)) for point in grid]


def assemble(
    local: Sequence[Tensor], ty: ShardType, sizes: Mapping[str, int], place: str, *, rtol: float
) -> Tensor:
    """Return the global value of all ranks' local tensors: slices joined, pending sums added.

    Args:
        local: one tensor per rank, row-major.
        ty: their type.
        sizes: mesh axis -> size.
        place: what the value is, for errors.
        rtol: relative L2 distance that copies on I and R axes may have.

    Raises:
        SimulationError: a local shape is not the type's, or copies that should agree differ.
    """
    copies: dict[tuple[int, ...], Tensor] = {}
    same = [axis for axis in sizes if ty.state(axis) not in (S, P)]
    for rank, (x, at) in enumerate(zip(local, points(sizes), strict=True)):
        if tuple(x.shape) != ty.local_shape(sizes):
            raise SimulationError(
                f"{place}: rank {rank} holds {list(x.shape)}, type {ty} says "
                f"{list(ty.local_shape(sizes))}."
            )
        whole = copies.setdefault(
            tuple(at[axis] for axis in same), torch.zeros(ty.shape, dtype=x.dtype)
        )
        box = spec_box(ty.spec, ty.shape, sizes, at)
        if x.dtype == torch.bool:
            whole[tuple(slice(a, b) for a, b in box)] |= x
        else:
            whole[tuple(slice(a, b) for a, b in box)] += x
    first, *others = copies.values()
    for key, other in zip(list(copies)[1:], others, strict=True):
        distance = (other.double() - first.double()).norm()
        if not distance <= rtol * first.double().norm() + 1e-300:
            raise SimulationError(
                f"{place}: {ty} should be the same over {same}, but the copy at {key} differs from "
                f"the first by {distance:.3g} of {first.double().norm():.3g}. Make it the same in "
                "the body (psum, all_gather), or declare it cut or partial there."
            )
    return first
