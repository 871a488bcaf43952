"""Storage changes memory, nothing else: gradients, steps, checkpoints are those of one rank."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.io.world import World
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.plan import plan
from megatree.parallel.schedule import (
    Schedule,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.parallel.storage import Storage
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime import pieces
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import TrainStep, train_step
from megatree.runtime.weights import Weights
from tests.ranks import ranks
from tests.runtime.one_device import assert_like_one_device, reference
from tests.runtime.table import MODELS, layouts
from tests.runtime.test_pipeline import batches
from tests.thread_worlds import threaded_worlds

SP = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
ZERO = {
    "zero-1": Storage(opt="dp"),
    "zero-2": Storage(grads="dp", opt="dp"),
    "zero-3": Storage(params="dp", grads="dp", opt="dp"),
}
# The mesh axes a dp of 4 is made of here, so that storage may take one of them.
HYBRID = {
    "inside": Storage(params="inner", grads="inner", opt="inner"),
    "inside, state everywhere": Storage(params="inner", grads="inner", opt=("inner", "outer")),
    "gradients inside, state everywhere": Storage(grads="inner", opt=("inner", "outer")),
    "everywhere": Storage(("inner", "outer"), ("inner", "outer"), ("inner", "outer")),
    "against the mesh's order": Storage(opt=("outer", "inner")),
}
GPT2 = GPTConfig(
    vocab_size=50, seq_length=8, num_layers=4, embed=16, kv_heads=4, head_dim=4, ffn=16,
    vocab_pad=8, norm="layer", positions="learned", activation="gelu", bias=True, tied=True,
)  # fmt: skip
LLAMA = replace(GPT2, norm="rms", positions="rotary", activation="swiglu", bias=False, tied=False)


def hybrid_mesh() -> Layout:
    return Layout(Mesh(outer=2, inner=2), Rules(batch=("outer", "inner")))


@pytest.mark.parametrize("storage", ZERO)
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama tied", "dp8"),
        ("gpt2 tied", "dp2 tp2"),
        ("llama", "dp2 tp4 sp"),
        ("few kv", "refined"),
    ],
)
def test_gradients_are_those_of_one_device(model: str, layout: str, storage: str) -> None:
    cut = replace(layouts(model)[layout], storage=ZERO[storage])
    assert_like_one_device(reference(MODELS[model]), cut)


@pytest.mark.parametrize("storage", HYBRID)
def test_gradients_under_hybrid_storage(storage: str) -> None:
    cut = replace(hybrid_mesh(), storage=HYBRID[storage])
    assert_like_one_device(reference(MODELS["gpt2 tied"]), cut)


def test_storage_may_cut_what_tensor_parallel_ranks_share() -> None:
    """Norms and biases are the same on tp ranks: they are sliced there, not reduced."""
    mesh = layouts("gpt2 tied")["dp2 tp2 sp"]
    for level in ("opt", "grads", "params"):
        names = ("params", "grads", "opt")[("params", "grads", "opt").index(level) :]
        storage = Storage(**dict.fromkeys(names, ("dp", "tp")))
        assert_like_one_device(reference(MODELS["gpt2 tied"]), replace(mesh, storage=storage))


@pytest.mark.full
@pytest.mark.parametrize("storage", ZERO)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_under_every_layout_with_data_parallelism(model: str, storage: str) -> None:
    for layout in layouts(model).values():
        if "dp" in layout.mesh.sizes:
            cut = replace(layout, storage=ZERO[storage])
            assert_like_one_device(reference(MODELS[model]), cut)


# -- whole steps ----------------------------------------------------------------------------------


def make(cfg: GPTConfig, layout: Layout, comm: Any = None, dtype=torch.float64) -> TrainStep:
    model = gpt(cfg, batch_size=4, dtype=dtype)
    return train_step(model, layout, adamw(1e-2), comm=comm, max_norm=0.5)


def train(cfg: GPTConfig, layout: Layout, comm: Any = None, steps: int = 10) -> list[Any]:
    """Train with clipping; return (loss, norm) per step and a last evaluation."""
    step = make(cfg, layout, comm)
    state, seen = step.init(0), []
    for number in range(steps):
        state, metrics = step(state, [step.local(b) for b in batches()])
        seen.append((metrics.loss.item(), metrics.grad_norm.item()))
        if number == 1:  # gathered weights must not outlive an update
            step.evaluate([step.local(b) for b in batches()])
    last = step.evaluate([step.local(b) for b in batches()])["loss"].item()
    return [*seen, (last, 0.0)]


def check(cfg: GPTConfig, layout: Layout, steps: int = 10) -> None:
    expected = torch.tensor(train(cfg, Layout(), steps=steps), dtype=torch.float64)
    for seen in Threads(layout.mesh.sizes).run(lambda comm: train(cfg, layout, comm, steps)):
        got = torch.tensor(seen, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("storage", ZERO)
def test_clipped_steps_under_tensor_and_data_parallelism(storage: str) -> None:
    check(GPT2, Layout(Mesh(dp=2, tp=2), SP, storage=ZERO[storage]), steps=4)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "interleaved": partial(interleaved, num_virtual=2),
    "zb-h1": zero_bubble_h1,
    "zb-v": zero_bubble_v,
}


@pytest.mark.parametrize("storage", ["zero-1", "zero-3"])
@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_clipped_steps_in_a_pipeline(name: str, storage: str) -> None:
    """Tied tables on two stages, and weight gradients that come after their cotangents."""
    mesh = Mesh(pp=2, dp=2)
    layout = Layout(mesh, Rules(batch="dp"), schedule=SCHEDULES[name], storage=ZERO[storage])
    check(GPT2, layout, steps=4)


@pytest.mark.full
@pytest.mark.parametrize("cfg", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("storage", ZERO)
@pytest.mark.parametrize("name", SCHEDULES)
def test_all_storages_and_schedules(name: str, storage: str, cfg: GPTConfig) -> None:
    layout = Layout(Mesh(pp=2, dp=2, tp=2), SP, schedule=SCHEDULES[name], storage=ZERO[storage])
    check(cfg, layout)


@pytest.mark.parametrize(
    "storage", ["inside, state everywhere", "gradients inside, state everywhere"]
)
def test_clipped_steps_under_hybrid_storage(storage: str) -> None:
    check(LLAMA, replace(hybrid_mesh(), storage=HYBRID[storage]), steps=4)


@pytest.mark.full
@pytest.mark.parametrize("storage", [*ZERO, *HYBRID])
def test_ten_clipped_steps(storage: str) -> None:
    layout = Layout(Mesh(dp=2, tp=2), SP, storage=ZERO.get(storage, Storage()))
    if storage in HYBRID:
        layout = replace(hybrid_mesh(), storage=HYBRID[storage])
    check(GPT2, layout)


@ranks(2)
def test_processes_agree_with_plain_data_parallelism() -> None:
    """Two ranks sum two terms in either order: every storage is bit-equal to plain data
    parallelism.
    """
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    expected = train(GPT2, layout, ProcessComm(layout.mesh), steps=3)
    for storage in ZERO.values():
        cut = replace(layout, storage=storage)
        seen = train(GPT2, cut, ProcessComm(layout.mesh), steps=3)
        assert [loss for loss, _ in seen[:1]] == [loss for loss, _ in expected[:1]]
        torch.testing.assert_close(
            torch.tensor(seen, dtype=torch.float64),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-13,
            atol=0,
        )


# -- memory ---------------------------------------------------------------------------------------


def test_at_most_two_entries_of_weights_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as live storages at every gather, forward and backward."""
    alive: dict[int, list[Any]] = {}
    most: dict[int, int] = {}
    gather = Weights.gather

    def counted(self: Weights, bucket: Any) -> Callable[[], Tensor]:
        wait = gather(self, bucket)

        def whole() -> Tensor:
            row = wait()
            if bucket[0].startswith("blocks"):
                held = alive.setdefault(id(self), [])
                held.append(torch.multiprocessing.reductions.StorageWeakRef(row.untyped_storage()))
                here = sum(not ref.expired() for ref in held)
                most[id(self)] = max(most.get(id(self), 0), here)
            return row

        return whole

    monkeypatch.setattr(Weights, "gather", counted)
    layout = Layout(Mesh(dp=2), Rules(batch="dp"), storage=ZERO["zero-3"])
    groups = Threads({"dp": 2}).run(
        lambda comm: (train(replace(LLAMA, num_layers=6), layout, comm, steps=2), 1)[1]
    )
    assert groups == [1, 1]
    rows = rows_of_a_block(layout)
    assert len(most) == 2
    assert len(rows) <= max(most.values()) <= 2 * len(rows)


def rows_of_a_block(layout: Layout) -> list[Any]:
    from megatree.parallel.model import lower_model
    from megatree.parallel.packing import pack

    program = lower_model(gpt(LLAMA, batch_size=4, dtype=torch.float64), layout)
    return [g for g in pack(program) if g.unit == "blocks.dense" and g.num_parts("params") > 1]


@pytest.mark.parametrize("storage", [*ZERO, *HYBRID])
def test_a_step_executes_the_collectives_of_its_plan(storage: str) -> None:
    layout = Layout(Mesh(dp=2, tp=2), SP, storage=ZERO.get(storage, Storage()))
    if storage in HYBRID:
        layout = replace(hybrid_mesh(), storage=HYBRID[storage])
    planned: Counter[str] = Counter()
    for c in plan(
        gpt(GPT2, batch_size=4, dtype=torch.float64), layout, num_microbatches=4
    ).collectives:
        if not (c.phase == "sync" and c.kind == "psum"):
            planned[c.kind] += c.count

    def rank_main(comm: ThreadComm) -> Counter[str]:
        step = make(GPT2, layout, comm)
        state = step.init(0)
        state.weights.settle()
        comm.counts.clear()
        state, _ = step(state, [step.local(b) for b in batches()])
        state.weights.settle()
        return Counter(comm.counts)

    for counts in Threads(layout.mesh.sizes).run(rank_main):
        for kind in ("psum_scatter", "all_to_all"):
            assert counts[kind] == planned[kind], kind
        # Weights that are whole at the turn from forward to backward are not gathered again.
        turns = planned["all_gather"] - counts["all_gather"]
        assert (0 < turns < 0.2 * planned["all_gather"]) if layout.storage.params else turns == 0


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_of_one_storage_loads_under_another(tmp_path) -> None:
    """ZeRO-3 on 4 ranks to one device to hybrid ZeRO under tp: the arrays know no storage."""
    first = Layout(Mesh(dp=4), Rules(batch="dp"), storage=ZERO["zero-3"])
    then = Layout(Mesh(dp=2, tp=2), SP, storage=ZERO["zero-1"])
    path = str(tmp_path / "a")

    def save_main(comm: ThreadComm) -> None:
        step = make(GPT2, first, comm)
        state = step.init(0)
        for _ in range(2):
            state, _ = step(state, [step.local(b) for b in batches()])
        pieces.save(path, step, state, threaded[comm.rank])

    threaded = threaded_worlds(4)
    Threads({"dp": 4}).run(save_main)
    expected = train(GPT2, Layout(), steps=4)[2:4]

    def go_on(layout: Layout, comm: Any, world: World) -> list[Any]:
        step = make(GPT2, layout, comm)
        state, _ = pieces.load(path, step, world)
        seen = []
        for _ in range(2):
            state, metrics = step(state, [step.local(b) for b in batches()])
            seen.append((metrics.loss.item(), metrics.grad_norm.item()))
        return seen

    runs = [go_on(Layout(), None, World.single())]
    threaded = threaded_worlds(4)
    runs += Threads(then.mesh.sizes).run(lambda comm: go_on(then, comm, threaded[comm.rank]))
    for seen in runs:
        torch.testing.assert_close(
            torch.tensor(seen, dtype=torch.float64),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-11,
            atol=0,
        )


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: Storage(params="dp"),
            "storage: grads=() does not begin with params=('dp',): what is cut for params is cut "
            "for grads too. Use grads=('dp',).",
        ),
        (
            lambda: Storage(opt=("dp", "dp")),
            "storage: opt=('dp', 'dp') names an axis twice. Name each once.",
        ),
        (
            lambda: Layout(Mesh(pp=2), schedule=one_f_one_b, storage=Storage(opt="pp")),
            "storage: opt pp: a pipeline rank holds its own layers already. Take pp out of the "
            "storage.",
        ),
        (
            lambda: Layout(Mesh(dp=2), storage=Storage(opt="data")),
            "mesh axis 'data': the mesh has dp (and pp, dp, ep, cp, tp of size 1 where absent). "
            "Add it to the Mesh or rename it in Rules.",
        ),
    ],
)
def test_contradictions_are_refused(build: Callable[[], Any], text: str) -> None:
    with pytest.raises(ShardingError) as error:
        build()
    assert str(error.value) == text
