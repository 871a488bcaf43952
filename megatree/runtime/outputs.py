"""Metrics of all stages and microbatches, made whole and given to every rank."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatree.parallel.comm import Axes, RankComm, run_steps
from megatree.parallel.layout import PIPELINE
from megatree.parallel.model import ModelProgram
from megatree.parallel.order import to_order
from megatree.parallel.transitions import plan_move
from megatree.parallel.types import I, ShardType

Key = tuple[str, int, str]
"""(unit, layer number, metric)."""


def metric_axes(program: ModelProgram) -> set[Axes]:
    """Return the tuples of mesh axes over which `whole_metrics` communicates."""
    found: set[Axes] = set()
    for unit in program.units.values():
        for at in unit.metrics.values():
            ty = unit.program.out_types[at]
            found.add((*_pipeline(program.layout.mesh.sizes), *ty.axes_in("P")))
            found |= {step.axes for step in plan_move(_summed(ty), _whole(ty))}
    return found


def whole_metrics(
    program: ModelProgram, comm: RankComm, parts: Sequence[Mapping[Key, Tensor]]
) -> dict[str, Tensor]:
    """Return every metric of every stage; all ranks call it and get the same.

    Law: equal to what one device computes, stacked.

    Args:
        program: the lowered model.
        comm: this rank's collectives.
        parts: per microbatch, the local metrics of this rank's stages.

    Returns:
        "segment.name" -> [microbatches, ...], and for a kind of a stack "stack.kind.name" ->
        [microbatches, layers of the kind, ...].
    """
    numbers: dict[str, list[int]] = {}
    for unit, _, number in program.order:
        numbers.setdefault(unit, []).append(number)
    out: dict[str, Tensor] = {}
    for name, unit in program.units.items():
        for metric, at in unit.metrics.items():
            ty = unit.program.out_types[at]
            local = _stacked(ty, program, comm, parts, [(name, n, metric) for n in numbers[name]])
            in_stack = any(index is not None for u, index, _ in program.order if u == name)
            whole = _made_whole(local, ty, comm)
            dims = tuple(dim + 2 for dim in ty.permuted)
            whole = to_order(whole, dims, program.layout.num_chunks, inverse=True)
            out[f"{name}.{metric}"] = whole if in_stack else whole[:, 0]
    return out


def _stacked(
    ty: ShardType,
    program: ModelProgram,
    comm: RankComm,
    parts: Sequence[Mapping[Key, Tensor]],
    keys: Sequence[Key],
) -> Tensor:
    """Stack a metric over microbatches and layers; zeros where another rank has it."""
    zero = torch.zeros(ty.local_shape(program.layout.sizes), dtype=ty.dtype, device=comm.device)
    return torch.stack([torch.stack([part.get(key, zero) for key in keys]) for part in parts])


def _made_whole(x: Tensor, ty: ShardType, comm: RankComm) -> Tensor:
    axes = (*_pipeline(comm.sizes), *ty.axes_in("P"))
    number = x.to(torch.uint8) if x.dtype == torch.bool else x  # collectives know no flags
    if axes:
        number = comm.psum(number.contiguous(), axes)
    steps = plan_move(_lifted(_summed(ty)), _lifted(_whole(ty)))
    return run_steps(comm, number, steps).to(x.dtype)


def _pipeline(sizes: Mapping[str, int]) -> Axes:
    return (PIPELINE,) if PIPELINE in sizes else ()


def _summed(ty: ShardType) -> ShardType:
    return replace(ty.with_kinds(dict.fromkeys(ty.axes_in("P"), I)), grad=False)


def _whole(ty: ShardType) -> ShardType:
    kinds = {axis: I for axis, _ in ty.kinds} | {a: I for axes in ty.spec for a in axes}
    return replace(ty, spec=((),) * len(ty.shape), kinds=tuple(kinds.items()), grad=False)


def _lifted(ty: ShardType) -> ShardType:
    """Return the type of values stacked over microbatches and layers, whose number is free."""
    return replace(ty, shape=(1, 1, *ty.shape), spec=((), (), *ty.spec))
