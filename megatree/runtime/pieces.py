"""A training state as boxes of global arrays, which is what a checkpoint holds."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatree.functional.param import Box, Param, logical_shape
from megatree.functional.tree import flatten_with_names
from megatree.io import checkpoint
from megatree.io.checkpoint import Piece, Saver
from megatree.io.checkpoint.listing import leaves, listing
from megatree.io.world import World
from megatree.parallel.comm import RankComm
from megatree.parallel.model import ModelProgram
from megatree.parallel.packing import Group
from megatree.runtime.masters import MASTER, Sides, Takes
from megatree.runtime.step import TrainState, TrainStep


def state_pieces(step: TrainStep, state: TrainState, shards: Mapping[str, Tensor]) -> list[Piece]:
    """Return this rank's pieces of the parameters, the optimizer's moments and the masters.

    Args:
        step: the bound step.
        state: the training state.
        shards: its parameters as `Weights.shards` gives them.
    """
    program, comm = step.program, step.gradients.bound.comm
    pieces = list(buffer_pieces(program, step.groups, comm, shards, "params"))
    for name, buffers in {**state.opt, "master": state.master}.items():
        pieces += buffer_pieces(program, step.groups, comm, buffers, f"opt.{name}")
    return pieces


def buffer_pieces(
    program: ModelProgram,
    groups: Sequence[Group],
    comm: RankComm,
    buffers: Mapping[str, Tensor],
    prefix: str,
) -> Iterator[Piece]:
    """Cut buffers at the finest level of storage into pieces, padding stripped: one per leaf and
    layer.
    """
    names, params, _ = flatten_with_names(program.model.params)
    declared: dict[str, Param] = dict(zip(names, params, strict=True))
    for group in groups:
        if group.name not in buffers:
            continue
        for leaf, layer, view in group.pieces(buffers[group.name]):
            param, ty = declared[leaf.path], program.types[leaf.path]
            shape = logical_shape(param, program.model.sizes, leaf.path)
            box = group.piece_box(ty, leaf, comm.sizes, comm.coords)
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
    saver: Saver | None = None,
) -> None:
    """Write a checkpoint of a training state; every rank calls it.

    Law: the state is saved as it is now. A saver in the background may still copy it when this
    returns; the next step waits for the copy before its update, as whatever changes the parameters
    does.

    Args:
        path: the directory to make, for example ".../step_00000020".
        step: the bound step whose layout cuts the state.
        state: what to save.
        world: the processes.
        extra: small values to keep beside the arrays (consumed samples, configuration).
        saver: writes it, perhaps while training goes on; None waits for it here.
    """
    extra = {**(extra or {}), **state.counters()}
    pieces = state_pieces(step, state, step.gradients.weights.shards())
    saver = saver or Saver(world)
    state.weights.lend(saver.begin(path, pieces, step=state.step, extra=extra))


class LoadedState(NamedTuple):
    """What a load gave, and what it did that a plain one does not.

    Args:
        state: of the training.
        extra: the small values beside the arrays.
        skipped: leaves that a pattern left as a run that starts anew has them.
        masters: what was done where float32 masters are on one side alone, "" for nothing.
    """

    state: TrainState
    extra: dict[str, Any]
    skipped: tuple[str, ...] = ()
    masters: str = ""


def load(path: str, step: TrainStep, world: World) -> tuple[TrainState, dict[str, Any]]:
    """Read a checkpoint, written under any layout, into this layout's buffers; every rank calls it.

    Returns:
        The state and the extra values.

    Raises:
        ValueError: leaves are missing, too many or of other shapes, dtypes or axes.
    """
    loaded = load_state(path, step, world)
    return loaded.state, loaded.extra


def load_state(
    path: str,
    step: TrainStep,
    world: World,
    *,
    masters: Literal["keep", "drop"] = "keep",
    skip: Sequence[str] = (),
) -> LoadedState:
    """Read a checkpoint as `load` does, by rules for what may differ.

    Law: nothing that the checkpoint knows of a parameter is lost, unless `masters` says so; the
    table of `masters.how` says what is read from where.

    Args:
        path: the checkpoint.
        step: the bound step.
        world: the processes.
        masters: "drop" goes on without masters from a checkpoint that has them.
        skip: glob patterns of parameters, such as "head.*", that begin as in a new run, whatever
            the checkpoint has of them.

    Raises:
        ValueError: leaves are missing, too many or of other shapes, dtypes or axes.
    """
    return _load(path, step, world, masters=masters, skip=skip, weights_only=False)


def load_weights(
    path: str, step: TrainStep, world: World, *, skip: Sequence[str] = ()
) -> LoadedState:
    """Read the parameters of a checkpoint for a run of its own; every rank calls it.

    Steps, optimizer and loss scale start afresh. Where the checkpoint has float32 masters, masters
    (or float32 parameters) begin with those.

    Args:
        path: the checkpoint.
        step: the bound step.
        world: the processes.
        skip: glob patterns of parameters, such as "head.*", that begin as in a new run, whatever
            the checkpoint has of them.

    Raises:
        ValueError: leaves are missing, too many or of other shapes, dtypes or axes.
    """
    return _load(path, step, world, masters="drop", skip=skip, weights_only=True)


def _load(
    path: str,
    step: TrainStep,
    world: World,
    *,
    masters: Literal["keep", "drop"],
    skip: Sequence[str],
    weights_only: bool,
) -> LoadedState:
    weights = step.gradients.weights
    before = step.init() if skip else None
    shards = weights.shards()
    state = before or step.blank(shards)
    there = world.broadcast(world.on_first(lambda: _headers(path)))
    take = Takes(there.dtypes, _sides(step, skip))
    if take.lost and masters == "keep" and not weights_only:
        raise ValueError(_losses(path, take.lost))
    cut = partial(buffer_pieces, step.program, step.groups, step.comm)
    pieces = [*take.routed(cut(shards, "params"), cut(state.master, MASTER))]
    if not weights_only:
        pieces += [x for name, part in state.opt.items() for x in cut(part, f"opt.{name}")]
    unused = tuple(map(escape, take.unused))
    with torch.no_grad():
        loaded = checkpoint.load(
            path,
            pieces,
            world=world,
            allow_extra=(*unused, "opt.*") if weights_only else unused,
            skip=[pattern for name in skip for pattern in (f"params.{name}", f"opt.*.{name}")],
        )
    take.finish(step.groups, shards, state.master)
    weights.publish(shards)
    if weights_only:
        state = step.fresh(state.master)
    else:
        state.restore(there.extra)
    return LoadedState(state, there.extra, loaded.skipped, take.told())


class _Headers(NamedTuple):
    """What of a manifest every rank needs to know before it says what it wants."""

    dtypes: dict[str, torch.dtype]
    extra: dict[str, Any]


def _headers(path: str) -> _Headers:
    manifest = checkpoint.read_manifest(path)
    dtypes = {stored.leaf.path: stored.leaf.dtype for stored in manifest.leaves}
    return _Headers(dtypes, dict(manifest.extra))


def _sides(step: TrainStep, skip: Sequence[str]) -> dict[str, Sides]:
    """Return the dtypes of all parameters, those of other ranks included, that are read."""
    precision, types = step.gradients.precision, step.program.types
    names, _, _ = flatten_with_names(step.program.model.params)
    sides = {}
    for path in names:
        dtype = types[path].dtype
        narrow = precision.master and precision.is_narrow(dtype)
        sides[path] = Sides(param=dtype, master=torch.float32 if narrow else None)
    return {path: x for path, x in sides.items() if not any(fnmatchcase(path, p) for p in skip)}


def _losses(path: str, lost: Sequence[str]) -> str:
    return listing(
        path,
        leaves(
            len(lost),
            "is a float32 master that this run keeps no copy of",
            "are float32 masters that this run keeps no copies of",
        ),
        lost,
        "Run with master copies, or go on from the rounded parameters: "
        'checkpoint.masters "drop", in Python load_state(masters="drop").',
    )
