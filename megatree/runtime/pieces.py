"""A training state as boxes of global arrays, which is what a checkpoint holds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatree.functional.param import Box, Param, logical_shape
from megatree.functional.tree import flatten_with_names
from megatree.io import checkpoint
from megatree.io.checkpoint import Piece
from megatree.io.world import World
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import spec_box
from megatree.parallel.model import ModelProgram
from megatree.runtime.packing import Group
from megatree.runtime.step import TrainState, TrainStep


def state_pieces(step: TrainStep, state: TrainState) -> list[Piece]:
    """Return this rank's pieces of the parameters, the optimizer's moments and the step count."""
    program, comm = step.program, step.gradients.bound.comm
    pieces = list(buffer_pieces(program, step.groups, comm, state.params, "params"))
    for name, buffers in state.opt.items():
        if buffers is not None:
            pieces += buffer_pieces(program, step.groups, comm, buffers, f"opt.{name}")
    return pieces


def buffer_pieces(
    program: ModelProgram,
    groups: Sequence[Group],
    comm: RankComm,
    buffers: Mapping[str, Tensor],
    prefix: str,
) -> Iterator[Piece]:
    """Cut buffers into pieces: one per leaf and layer, padding stripped."""
    names, leaves, _ = flatten_with_names(program.model.params)
    declared: dict[str, Param] = dict(zip(names, leaves, strict=True))
    for group in groups:
        for leaf, layer, view in group.rows(buffers[group.name]):
            param, ty = declared[leaf.path], program.types[leaf.path]
            shape = logical_shape(param, program.model.sizes, leaf.path)
            box = spec_box(ty.spec, ty.shape, comm.sizes, comm.coords)
            kept = _inside(box, shape if layer is None else shape[1:])
            data = view[tuple(slice(0, b - a) for a, b in kept)]
            yield Piece(
                path=f"{prefix}.{leaf.path}",
                shape=shape,
                dtype=data.dtype,
                axes=param.axes,
                box=kept if layer is None else ((layer, layer + 1), *kept),
                data=data if layer is None else data.unsqueeze(0),
            )


def _inside(box: Box, shape: tuple[int, ...]) -> Box:
    """Clip a box of the padded array to the logical one; it may become empty."""
    return tuple((min(a, n), min(b, n)) for (a, b), n in zip(box, shape, strict=True))


def save(
    path: str,
    step: TrainStep,
    state: TrainState,
    world: World,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of a training state; every rank calls it.

    Args:
        path: the directory to make, for example ".../step_00000020".
        step: the bound step whose layout cuts the state.
        state: what to save.
        world: the processes.
        extra: small values to keep beside the arrays (consumed samples, configuration).
    """
    extra = {**(extra or {}), "step": state.step}
    checkpoint.save(path, state_pieces(step, state), world=world, extra=extra)


def load(path: str, step: TrainStep, world: World) -> tuple[TrainState, dict[str, Any]]:
    """Read a checkpoint, written under any layout, into this layout's buffers; every rank calls it.

    Returns:
        The state and the extra values.

    Raises:
        ValueError: leaves are missing, too many or of other shapes, dtypes or axes.
    """
    params = step.gradients.params
    state = TrainState(0, params, step.optimizer.init(params))
    with torch.no_grad():
        checkpoint.load(path, state_pieces(step, state), world=world)
    extra = dict(world.broadcast(world.on_first(lambda: checkpoint.load_extra(path))))
    state.step = int(extra.pop("step"))
    return state, extra
