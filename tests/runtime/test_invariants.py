"""A bit that flips on one rank is found, and named: leaf, layer, both ranks."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from megatree.functional.tree import flatten_with_names
from megatree.io.world import World
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import one_f_one_b
from megatree.parallel.storage import Storage
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.health import Health
from megatree.runtime.invariants import check_invariant
from megatree.runtime.processes import world_of_group
from megatree.runtime.step import TrainState, TrainStep
from megatree.runtime.train import Care, Loop, Progress, train
from tests.ranks import ranks
from tests.runtime.tiny_step import BATCH, tiny_data, tiny_step
from tests.thread_worlds import threaded_worlds

RULES = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp")
MESHES = {
    "dp": Layout(Mesh(dp=2), Rules(batch="dp")),
    "dp tp": Layout(Mesh(dp=2, tp=2), RULES),
    "ZeRO-1": Layout(Mesh(dp=2, tp=2), RULES, storage=Storage(opt="dp")),
    "ZeRO-3": Layout(Mesh(dp=2, tp=2), RULES, storage=Storage("dp", "dp", "dp")),
    "pp": Layout(Mesh(pp=2, dp=2), Rules(batch="dp"), schedule=one_f_one_b),
}


def trained(step: TrainStep) -> TrainState:
    """Return the state after a step on the first samples."""
    whole = tiny_data().batch(0, BATCH)
    state, _ = step(step.init(), [step.local(whole)])
    return state


def on_threads(layout: Layout, body: Any) -> list[Any]:
    """Run `body(step, state, world)` on all ranks of a layout."""
    worlds = threaded_worlds(layout.mesh.num_ranks)

    def rank(comm: ThreadComm) -> Any:
        step = tiny_step(layout, comm)
        return body(step, trained(step), worlds[comm.rank])

    return Threads(layout.mesh.sizes).run(rank)


@pytest.mark.parametrize("name", MESHES)
def test_ranks_that_agree_pass(name: str) -> None:
    on_threads(MESHES[name], check_invariant)


def flip(step: TrainStep, buffer: torch.Tensor, path: str, row: int = 0, bit: int = 0) -> None:
    """Flip a bit of a leaf's first element."""
    group = next(g for g in step.groups if any(leaf.path == path for leaf in g.leaves))
    leaf = next(leaf for leaf in group.leaves if leaf.path == path)
    view = group.whole(buffer[row], leaf).detach().view(-1)
    view.view(torch.int32)[0] ^= 1 << bit


def name_of(step: TrainStep, path: str) -> str:
    return next(g.name for g in step.groups if any(leaf.path == path for leaf in g.leaves))


def test_what_one_rank_alone_holds_may_differ() -> None:
    """A leaf cut over tp: its pieces on two tp ranks are no copies."""
    layout = Layout(Mesh(tp=2), RULES)

    def body(step: TrainStep, state: TrainState, world: World) -> None:
        path = next(p for p, ty in step.program.types.items() if any(ty.spec) and p.startswith("b"))
        if world.rank == 1:
            flip(step, state.params[name_of(step, path)], path)
        check_invariant(step, state, world)

    on_threads(layout, body)


@pytest.mark.parametrize("name", ["dp tp", "ZeRO-1", "pp"])
def test_a_flipped_bit_is_named_with_leaf_layer_and_ranks(name: str) -> None:
    layout = MESHES[name]

    def body(step: TrainStep, state: TrainState, world: World) -> str:
        if world.rank == layout.mesh.num_ranks - 1:  # the last layer is there
            group = next(g for g in step.groups if g.layers is not None)
            flip(step, state.params[group.name], group.leaves[0].path, group.num_rows - 1)
            told = group.leaves[0].path
        else:
            told = ""
        with pytest.raises(ValueError, match="drifted") as caught:
            check_invariant(step, state, world)
        return f"{told}|{caught.value}"

    told = on_threads(layout, body)
    path, message = told[-1].split("|")
    assert len({text.split("|")[1] for text in told}) == 1, "all ranks say the same"
    twin = "2" if name == "pp" else "1"  # rank 3 is (pp 1, dp 1), or (dp 1, tp 1)
    assert re.match(
        rf"step 1: params\.{re.escape(path)} \(layer 1\) drifted: copies .* hash to [0-9a-f]{{16}} "
        rf"on rank 3, [0-9a-f]{{16}} on ranks? .*{twin}",
        message,
    ), message


@ranks(2)
def test_drift_is_named_on_processes() -> None:
    layout, world = MESHES["dp"], world_of_group()
    step = tiny_step(layout, ProcessComm(layout.mesh))
    state = trained(step)
    check_invariant(step, state, world, facts={"consumed": 4})
    names, _, _ = flatten_with_names(step.program.model.params)
    path = names[0]
    before = {name: buffer.clone() for name, buffer in state.opt["m"].items()}
    if world.rank == 1:
        flip(step, state.opt["m"][name_of(step, path)], path)
    with pytest.raises(ValueError, match=rf"opt\.m\.{re.escape(path)}.* drifted: .* on rank 1"):
        check_invariant(step, state, world)
    for name, buffer in before.items():
        state.opt["m"][name].copy_(buffer)
    check_invariant(step, state, world)
    with pytest.raises(ValueError, match=r"step 1: consumed is 5 on rank 1, 4 on rank 0\. All"):
        check_invariant(step, state, world, facts={"consumed": 4 + world.rank})


def test_a_run_compares_every_so_many_steps() -> None:
    layout = MESHES["dp"]

    def body(step: TrainStep, state: TrainState, world: World) -> int:
        data, seen = tiny_data(), []

        def report(kind: str, fields: Mapping[str, Any]) -> None:
            seen.append(fields["step"])
            if fields["step"] == 3:  # on rank 0 alone; an update would round the last bit away
                group = step.groups[0]
                flip(step, state.params[group.name], group.leaves[0].path, bit=20)

        loop = Loop(steps=9, global_batch=BATCH, microbatch=BATCH)
        care = Care(health=Health(invariant_every=2))
        start = Progress(state=state, consumed=BATCH)
        with pytest.raises(ValueError, match=r"step 4: params\.\S+ .*drifted"):
            train(step, start, loop, data=data, lr=float, world=world, report=report, care=care)
        return len(seen)

    assert on_threads(layout, body) == [2, 0], "the steps before are told, and by rank 0"
