"""`verify`: a function under a layout against one device, simulated and on real processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatree.functional.tree import leaves_of
from megatree.parallel.layout import Layout
from megatree.parallel.program import Program
from megatree.parallel.simulate import (
    Simulated,
    assemble_results,
    lower_for,
    run_rank,
    simulate,
)
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.processes import launch, world_of_group


@dataclass(frozen=True, kw_only=True)
class Verified:
    """How far a layout's results are from one device's: largest relative L2 over values and grads.

    Args:
        program: the lowered program.
        simulated: error on simulated ranks.
        processes: error on gloo processes.
    """

    program: Program
    simulated: float
    processes: float

    def __str__(self) -> str:
        counts = {p: self.program.counts(p) for p in ("forward", "backward", "sync")}
        moves = "; ".join(
            f"{phase} {', '.join(f'{n} {kind}' for kind, n in found.items()) or 'nothing'}"
            for phase, found in counts.items()
        )
        return (
            f"{self.program.name} on {self.program.layout.mesh}: {moves}. Off one device by "
            f"{self.simulated:.1e} simulated, {self.processes:.1e} on processes."
        )


def verify(
    fn: Callable[..., Any],
    layout: Layout,
    *values: Any,
    axes: tuple[Any, ...],
    rtol: float = 1e-10,
) -> Verified:
    """Check that a layout does not change a function's values and gradients.

    Runs it on one device, on simulated ranks, and on as many gloo processes as the mesh has ranks.

    Args:
        fn: a global-view function of trees of tensors, importable by new processes.
        layout: mesh and rules.
        values: whole tensors, one tree per argument.
        axes: per argument a tree of Param, Array or axis strings, see `simulate`.
        rtol: relative L2 distance at which it is an error.

    Returns:
        The errors found and the program.

    Raises:
        ShardingError: the function cannot be typed.
        ValueError: values or gradients differ from one device's by more than `rtol`.
    """
    alone = simulate(fn, Layout(), *values, axes=axes)
    simulated = simulate(fn, layout, *values, axes=axes)
    nproc = layout.mesh.num_ranks
    results = launch(_rank_main, nproc, fn, layout, values, axes, threads=1)
    program = simulated.program
    real = assemble_results(program, results, {}, rtol=rtol)
    found = Verified(
        program=program, simulated=distance(simulated, alone), processes=distance(real, alone)
    )
    if not max(found.simulated, found.processes) <= rtol:
        raise ValueError(
            f"verify: {found} Allowed is {rtol:.1e}. Run rulecheck on the ops it uses."
        )
    return found


def _rank_main(
    device: torch.device,
    fn: Callable[..., Any],
    layout: Layout,
    values: Sequence[Any],
    axes: Sequence[Any],
) -> list[Any]:
    program = lower_for(fn, layout, values, axes)
    comm = ProcessComm(layout.mesh, device)
    comm.prepare(sorted({c.axes for c in program.collectives} | program.table_axes))
    return world_of_group().gather(run_rank(program, comm, leaves_of(tuple(values))))


def distance(a: Simulated, b: Simulated) -> float:
    """Return the largest relative L2 distance over values and gradients."""
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return max(
        ((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)).item()
        for x, y in pairs
    )


def tensors_of(run: Simulated) -> list[Tensor]:
    """Return all values and gradients of a run."""
    return [x for x in leaves_of((run.value, run.grads)) if isinstance(x, Tensor)]
