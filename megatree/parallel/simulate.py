"""`simulate`: run all ranks of a lowered function in this process, forward and backward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import optree
import torch
from torch import Tensor

from megatree.functional.param import Array, Param
from megatree.functional.tree import leaves_of
from megatree.parallel.assemble import assemble
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import Layout, cut
from megatree.parallel.lower import lower
from megatree.parallel.order import to_order
from megatree.parallel.program import Program
from megatree.parallel.threads import ThreadComm, Threads
from megatree.parallel.types import I, ShardType


@dataclass(frozen=True)
class Simulated:
    """What all ranks of a program computed together.

    Args:
        value: the result's tree, as whole tensors.
        grads: per argument the tree of whole gradients (None where none flows).
        counts: collectives that rank 0 executed, by kind.
        program: the lowered program.
    """

    value: Any
    grads: tuple[Any, ...]
    counts: dict[str, int]
    program: Program


def simulate(
    fn: Callable[..., Any],
    layout: Layout,
    *values: Any,
    axes: tuple[Any, ...],
    cotangents: Any = None,
    rtol: float = 1e-9,
) -> Simulated:
    """Lower a function and run every rank as a thread; compare copies, return whole values.

    Args:
        fn: a global-view function of trees of tensors.
        layout: mesh and rules.
        values: whole tensors, one tree per argument.
        axes: per argument a tree of the same structure of Param, Array or axis strings (a string
            stands for an Array that takes a gradient if it is floating point).
        cotangents: tree like the result of whole cotangents; None: ones for every floating result.
        rtol: relative L2 distance that copies of one value may have.

    Returns:
        Values, gradients, collective counts and the program.

    Raises:
        ShardingError: the function cannot be typed.
        SimulationError: ranks disagree on a collective, wait for each other, or copies differ.
    """
    program = lower_for(fn, layout, values, axes)
    return run_simulated(program, leaves_of(values), cotangents, rtol=rtol)


def lower_for(
    fn: Callable[..., Any], layout: Layout, values: Sequence[Any], axes: Sequence[Any]
) -> Program:
    """Lower a function for whole values and their declarations; see `simulate`."""
    sizes: dict[str, int] = {}
    abstract = tuple(
        optree.tree_map(lambda x, leaf: _declare(x, leaf, sizes), value, axis)
        for value, axis in zip(values, axes, strict=True)
    )
    return lower(fn, layout, *abstract, sizes=sizes)


def _declare(value: Tensor, leaf: Any, sizes: dict[str, int]) -> Param | Array:
    """Fill a declaration with the shape and dtype of a value; collect the sizes of its axes."""
    if isinstance(leaf, str):
        leaf = Array(leaf, grad=value.is_floating_point())
    if isinstance(leaf, Array):
        return Array(leaf.axes, value.dtype, tuple(value.shape), leaf.grad)
    sizes.update(zip(leaf.names, value.shape, strict=True))
    return replace(leaf, dtype=value.dtype)


RankResult = tuple[list[Tensor], list[Tensor | None]]
"""One rank's results and the gradients of its inputs, after their hoisted sums."""


def run_simulated(
    program: Program,
    leaves: Sequence[Tensor | list[Tensor]],
    cotangents: Any = None,
    *,
    rtol: float = 1e-9,
) -> Simulated:
    """Run a lowered program on whole tensors, or on lists of one tensor per rank; see
    `simulate`.
    """
    comms: list[ThreadComm] = []

    def rank_main(comm: ThreadComm) -> RankResult:
        comms.append(comm)
        mine = [x[comm.rank] if isinstance(x, list) else x for x in leaves]
        whole = [not isinstance(x, list) for x in leaves]
        return run_rank(program, comm, mine, cotangents, whole=whole)

    results = Threads(program.mesh_sizes).run(rank_main)
    counts = next(c.counts for c in comms if c.rank == 0)
    return assemble_results(program, results, counts, rtol=rtol)


def run_rank(
    program: Program,
    comm: RankComm,
    leaves: Sequence[Tensor],
    cotangents: Any = None,
    *,
    whole: Sequence[bool] | None = None,
) -> RankResult:
    """Run a program forward and backward on one rank, and sum the gradients of its leaves.

    Args:
        program: lowered.
        comm: the rank's.
        leaves: flat inputs.
        cotangents: tree like the result, of whole cotangents; None: ones.
        whole: per input, whether it is the whole value, to be cut here; None: all are.
    """
    sizes, chunks = program.mesh_sizes, program.layout.num_chunks
    mine = [
        (cut(to_order(x, ty.permuted, chunks), ty.spec, sizes, comm.coords) if is_whole else x)
        .detach()
        .clone()
        .requires_grad_(ty.grad)
        for x, ty, is_whole in zip(
            leaves, program.types.values(), whole or [True] * len(leaves), strict=True
        )
    ]
    outs = program.bind(comm)(*mine)
    roots, gs = [], []
    for out, ty, seed in zip(outs, program.out_types, _seeds(program, cotangents), strict=True):
        if out.requires_grad and seed is not None:
            roots.append(out)
            ordered = to_order(seed, ty.permuted, chunks)
            gs.append(cut(ordered, ty.spec, sizes, comm.coords))
    if roots:
        torch.autograd.backward(roots, gs)
    grads: list[Tensor | None] = []
    for x, (path, ty) in zip(mine, program.types.items(), strict=True):
        grad = torch.zeros_like(x) if ty.grad and x.grad is None else x.grad
        over = program.sync.get(path, ())
        grads.append(comm.psum(grad, over) if over and grad is not None else grad)
    return [out.detach() for out in outs], grads


def assemble_results(
    program: Program, results: Sequence[RankResult], counts: dict[str, int], *, rtol: float
) -> Simulated:
    """Put all ranks' results and gradients together, checking that copies agree."""
    sizes, chunks = program.mesh_sizes, program.layout.num_chunks

    def whole(local: list[Tensor], ty: ShardType, place: str) -> Tensor:
        joined = assemble(local, ty, sizes, place, rtol=rtol)
        return to_order(joined, ty.permuted, chunks, inverse=True)

    value = [
        whole([r[0][i] for r in results], ty, f"result {i}")
        for i, ty in enumerate(program.out_types)
    ]
    grads = [
        whole(
            [cast(Tensor, r[1][i]) for r in results],
            ty.with_kinds(dict.fromkeys(program.sync.get(path, ()), I)).dual,
            f"gradient of {path}",
        )
        if ty.grad
        else None
        for i, (path, ty) in enumerate(program.types.items())
    ]
    return Simulated(
        value=optree.tree_unflatten(program.out_tree, value),
        grads=cast(tuple[Any, ...], optree.tree_unflatten(program.in_tree, grads)),
        counts=counts,
        program=program,
    )


def _seeds(program: Program, cotangents: Any) -> list[Tensor | None]:
    if cotangents is not None:
        return optree.tree_leaves(cotangents, none_is_leaf=True)
    return [
        torch.ones(ty.shape, dtype=ty.dtype) if ty.dtype.is_floating_point else None
        for ty in program.out_types
    ]
