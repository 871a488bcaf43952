"""The stages of a model that one rank holds: what enters and leaves them, and a plain forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatree.parallel.layout import PIPELINE
from megatree.parallel.model import ModelProgram
from megatree.parallel.types import ShardType
from megatree.runtime.forward import BoundModel, Forward, Leaves, TermKey

Local = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one rank's piece: all that a receive needs, so none is exchanged."""


@dataclass(frozen=True)
class Stage:
    """One stage of this rank.

    Args:
        entries: what it runs, of the program's order.
        takes_grad: per tensor of the carry that enters, whether a gradient flows back from it.
        gives_grad: the same of the carry that leaves; empty for the last stage.
        is_last: whether it is the last stage of the model.
        enters: what a receive of the carry allocates.
        cotangents: what a receive of the gradient of the carry that leaves allocates.
    """

    entries: list[tuple[str, int | None, int]]
    takes_grad: tuple[bool, ...]
    gives_grad: tuple[bool, ...]
    is_last: bool
    enters: tuple[Local, ...]
    cotangents: tuple[Local, ...]


def stages_of(program: ModelProgram, rank: int) -> dict[int, Stage]:
    """Return the stages that a pipeline rank holds, by number, in the order of the model."""
    last = len(program.stage_rank) - 1

    def carry(stage: int) -> tuple[ShardType, ...]:
        return program.carry_types(stage) if 0 <= stage < last else ()

    def local(types: tuple[ShardType, ...]) -> tuple[Local, ...]:
        return tuple((ty.local_shape(program.layout.sizes), ty.dtype) for ty in types)

    return {
        stage: Stage(
            entries=program.entries(stage),
            takes_grad=tuple(ty.grad for ty in carry(stage - 1)),
            gives_grad=tuple(ty.grad for ty in carry(stage)),
            is_last=stage == last,
            enters=local(carry(stage - 1)),
            cotangents=local(tuple(ty for ty in carry(stage) if ty.grad)),
        )
        for stage, holder in enumerate(program.stage_rank)
        if holder == rank
    }


@torch.no_grad()
def run_stages(bound: BoundModel, leaves: Leaves, consts: Mapping[str, Tensor]) -> Forward:
    """Run one microbatch through all stages without gradients; every rank calls it.

    Returns:
        The sums and metrics of this rank's stages, and where the last stage lies its carry.
    """
    comm, program = bound.comm, bound.program
    rank, holders = comm.coords.get(PIPELINE, 0), program.stage_rank
    sums: dict[TermKey, Tensor] = {}
    metrics: dict[TermKey, Tensor] = {}
    carry: tuple[Tensor, ...] = ()
    kept: dict[int, tuple[Tensor, ...]] = {}
    sending: list[Callable[[], None]] = []
    for number, stage in stages_of(program, rank).items():
        if number and holders[number - 1] != rank:
            receives = [
                comm.recv_async(shape, dtype, PIPELINE, holders[number - 1])
                for shape, dtype in stage.enters
            ]
            carry = tuple(wait() for wait in receives)
        elif number:
            carry = kept.pop(number - 1)
        out = bound.run(stage.entries, leaves, carry, consts)
        sums.update(out.sums)
        metrics.update(out.metrics)
        carry = out.carry
        if number + 1 < len(holders) and holders[number + 1] != rank:
            sending += [
                comm.send_async(x.contiguous(), PIPELINE, holders[number + 1]) for x in carry
            ]
        else:
            kept[number] = carry
    for wait in sending:
        wait()
    return Forward(kept.get(len(holders) - 1, ()), sums, metrics, [])
