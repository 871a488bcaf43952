"""The checks can fail: each test breaks one thing and sees a small comparison go red."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.parallel import codegen, comm, lower, types
from megatree.parallel.comm import BodyComm, RankComm
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.storage import Storage
from megatree.parallel.threads import SimulationError, ThreadComm
from megatree.parallel.tracer import Tracer
from megatree.parallel.transitions import Step
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.gradients import Gradients
from megatree.runtime.leaves import Gathered
from megatree.runtime.sums import GradientSums
from tests.parallel.test_local_map import LAYOUTS, PRIMITIVES, real
from tests.parallel.worlds import all_types, moves_go_wrong
from tests.parallel.worlds import assert_like_one_device as function_like_one_device
from tests.ranks import ranks
from tests.runtime.one_device import assert_like_one_device, reference
from tests.runtime.table import MODELS, layouts
from tests.runtime.test_value_and_grad import expected_counts

RED = (AssertionError, SimulationError, ShardingError)


def step(model: str, name: str, storage: Storage = Storage()) -> Callable[[], Any]:  # noqa: B008
    layout = replace(layouts(model)[name], storage=storage)
    return lambda: assert_like_one_device(reference(MODELS[model]), layout)


def moves() -> None:
    """All moves of a matrix over one axis."""
    states = all_types({"a": 2}, (4, 4))
    wrong = moves_go_wrong(list(itertools.product(states, states)), {"a": 2})
    assert not wrong, "; ".join(wrong)


def law() -> None:
    function_like_one_device(
        PRIMITIVES, LAYOUTS["one axis"], (real(2, 16, 8), real(8)), ("batch seq embed", "embed")
    )


def fork() -> None:
    """A gathered value with a use that differs by rank, and one that does not."""

    def fn(x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        y = shard(x, "batch seq embed")
        return F.linear(y, up), y.square()

    layout = Layout(Mesh(tp=2), Rules(seq_res="tp", ffn="tp"))
    axes = ("batch seq_res embed", "ffn embed")
    function_like_one_device(fn, layout, (real(2, 4, 8), real(6, 8)), axes)


TP, SP, DP = step("llama", "tp2"), step("llama", "tp2 sp"), step("llama", "dp2")
BOTH = step("llama", "dp2 tp2")
# Learned positions are sliced by index: without them a wrong order of chunks cancels itself.
SWAPPED, DROPOUT = step("gpt2 tied", "tp over two, swapped"), step("gpt2 dropout", "tp2 sp")
ZERO1 = step("llama", "dp2 tp2", Storage(opt="dp"))
ZERO3 = step("llama", "dp2 tp2", Storage("dp", "dp", "dp"))
HYBRID = step("llama", "two dp axes", Storage(grads="ep", opt=("ep", "dp")))


@pytest.mark.parametrize(
    "check", [moves, law, fork, TP, SP, DP, BOTH, SWAPPED, DROPOUT, ZERO1, ZERO3, HYBRID]
)
def test_all_checks_are_green_without_a_mutation(check: Callable[[], Any]) -> None:
    check()


def skip_steps(*kinds: str) -> Callable[..., Tensor]:
    """Return `run_steps` without the steps of some kinds."""
    run = comm.run_steps

    def some(rank: RankComm, x: Tensor, steps: Sequence[Step]) -> Tensor:
        return run(rank, x, tuple(s for s in steps if s.kind not in kinds))

    return some


def dual_without(kind: str) -> Callable[..., Any]:
    """Return `bound_move` whose backward leaves out the steps of a kind."""
    bind = codegen.bound_move

    def some(rank: RankComm, steps: Any, dual: Any, grad: bool) -> Any:
        return bind(rank, steps, tuple(s for s in dual if s.kind != kind), grad)

    return some


def over_the_other_axis(raw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    other = {"dp": "tp", "tp": "dp"}

    def swapped(rank: RankComm, x: Tensor, axes: tuple[str, ...], *rest: Any) -> Tensor:
        return raw(rank, x, tuple(other.get(axis, axis) for axis in axes), *rest)

    return swapped


def twice(sum_row: Callable[..., None]) -> Callable[..., None]:
    def both(sums: GradientSums, *args: Any) -> None:
        sum_row(sums, *args)
        sums._waits.pop()() if sums._waits else None
        sum_row(sums, *args)

    return both


def not_at_all(*args: Any) -> None:
    return None


def own_part(sums: GradientSums, row: Tensor, axes: Any, sync: Any) -> Callable[[], Tensor]:
    """Keep a part of this rank's own gradients, as if they were the same on all ranks."""
    return lambda: row.view(sums.comm.size(axes), -1)[sums.comm.index(axes)]


def noted_elsewhere(gathered: Gathered, x: Tensor) -> Any:
    """Note the first weight of a row instead of the one that is saved."""
    found = NOTE(gathered, x)
    return found if isinstance(found, Tensor) else found._replace(offset=0)


NOTE = Gathered.note


def local_only(
    gradients: Gradients, parts: Any, keys: Any, which: int, bound: Any
) -> dict[Any, Tensor]:
    """Add a term over microbatches, not over ranks."""
    return {key: torch.stack([part[key].double() for part in parts]).sum() for key in keys}


@pytest.mark.parametrize(
    ("target", "name", "change", "check"),
    [
        # types and transitions
        (types, "_DUAL", {"I": "I", "R": "R", "P": "P"}, SP),
        (types, "_DUAL", {"I": "P", "R": "P", "P": "R"}, TP),
        (comm, "run_steps", skip_steps("mask"), moves),
        (comm, "run_steps", skip_steps("psum"), moves),
        (comm, "run_steps", skip_steps("psum"), TP),
        (codegen, "bound_move", dual_without("psum"), TP),
        (codegen, "bound_move", dual_without("mask"), fork),
        # collectives
        (ThreadComm, "psum", over_the_other_axis(ThreadComm.psum), BOTH),
        (ThreadComm, "members", lambda rank, axes: sorted(MEMBERS(rank, axes)), SWAPPED),
        (RankComm, "index", lambda rank, axes: 0, SP),
        # what an op or a body does by itself
        (BodyComm, "psum", lambda body, x, axis: x, TP),
        (BodyComm, "pmax", lambda body, x, axis: x.detach(), TP),
        (BodyComm, "axis_index", lambda body, axis: 0, TP),
        (BodyComm, "axis_index", lambda body, axis: 0, DROPOUT),
        (Tracer, "finish", lambda tracer, x: x, law),
        # the step
        (GradientSums, "_sum", not_at_all, DP),
        (GradientSums, "_sum", not_at_all, SP),
        (GradientSums, "_sum", twice(GradientSums._sum), DP),
        # storage
        (GradientSums, "_sum", not_at_all, ZERO1),
        (GradientSums, "_scatter", not_at_all, ZERO3),
        (GradientSums, "_finish_cut", not_at_all, HYBRID),
        (GradientSums, "_reduce", own_part, ZERO1),
        (Gathered, "note", noted_elsewhere, ZERO3),
        (RankComm, "index", lambda rank, axes: 0, ZERO1),
        (Gradients, "_total", local_only, DP),
    ],
)
def test_a_mutation_is_seen(
    target: Any, name: str, change: Any, check: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, change)
    with pytest.raises(RED):
        check()


MEMBERS = ThreadComm.members


@pytest.mark.parametrize(
    ("primitive", "wrong"),
    [
        (comm.psum, lambda: (lambda rank, x, axes: x, ())),
        (
            comm.all_gather,
            lambda dim: (
                lambda rank, x, axes, d: x.chunk(rank.size(axes), d)[rank.index(axes)],
                (dim,),
            ),
        ),
        (
            comm.psum_scatter,
            lambda dim: (lambda rank, x, axes, d: torch.cat([x] * rank.size(axes), d), (dim,)),
        ),
        (comm.all_to_all, lambda split, concat: (comm.all_to_all, (split, concat))),
        (comm.ppermute, lambda shift: (lambda rank, x, axes: x, ())),
        (comm.all_to_all_v, lambda send, recv: (lambda rank, x, axes: x, ())),
    ],
    ids=["psum", "all_gather", "psum_scatter", "all_to_all", "ppermute", "all_to_all_v"],
)
def test_a_wrong_dual_of_a_primitive_is_seen(
    primitive: Any, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, in the body that has them all: no other primitive hides it."""
    monkeypatch.setitem(comm.DUALS, primitive, wrong)
    with pytest.raises(RED):
        law()


def without_widen(graph: Any, mesh_axes: Any, sync: Any) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(sync, ())


@pytest.mark.parametrize(
    ("name", "change", "model"),
    [("widen", without_widen, "llama"), ("push_up", lambda graph: None, "mqa")],
)
def test_without_a_pass_gradients_are_right_and_the_counts_are_not(
    name: str, change: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes save communication and change no number."""
    before = step(model, "tp2 sp")()
    monkeypatch.setattr(lower, name, change)
    after = step(model, "tp2 sp")()
    block = [c.program.units["blocks.dense"].program.counts("backward") for c in (before, after)]
    assert sum(block[1].values()) > sum(block[0].values()) == 4
    assert dict(after.counts) != expected_counts(before)


@ranks(4)
def test_chunks_in_the_order_of_the_group_are_the_wrong_ones() -> None:
    """torch sorts the ranks of a group; axes against mesh order need their chunks permuted."""
    rank = ProcessComm(Mesh(x=2, y=2))
    axes = ("y", "x")
    rank.prepare([axes])
    x = torch.arange(16.0).view(4, 4) + 100 * dist.get_rank()
    calls = (
        lambda: rank.all_gather(x, axes, 0),
        lambda: rank.psum_scatter(x, axes, 0),
        lambda: rank.all_to_all(x, axes, 0, 1),
    )
    right = [call() for call in calls]
    rank.orders[axes] = None
    wrong = [torch.equal(call(), value) for call, value in zip(calls, right, strict=True)]
    outer = dist.get_rank() in (0, 3)  # the ends of the group keep their own slice
    assert wrong == [False, outer, False]
