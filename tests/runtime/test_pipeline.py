"""Pipelines against one device: every schedule, placement and mix; messages, tied leaves, norm."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.io.world import World
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules, cut
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.placement import Placement
from megatree.parallel.schedule import (
    Schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.parallel.threads import Threads
from megatree.runtime import pieces
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import TrainStep, train_step
from tests.ranks import ranks
from tests.thread_worlds import threaded_worlds
from tests.tolerances import assert_leaves_close

SIZES = {
    "vocab_size": 50, "seq_length": 8, "num_layers": 4, "embed": 16, "kv_heads": 4, "head_dim": 4,
    "ffn": 16, "vocab_pad": 8,
}  # fmt: skip
LLAMA = GPTConfig(**SIZES, group=2)  # type: ignore[arg-type]
GPT2 = GPTConfig(
    **SIZES, norm="layer", positions="learned", activation="gelu", bias=True, tied=True
)  # type: ignore[arg-type]
TENSOR = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
MIXES: dict[str, tuple[dict[str, int], Rules]] = {
    "alone": ({}, Rules()),
    "tp": ({"tp": 2}, TENSOR.updated(seq_res=None)),
    "sp": ({"tp": 2}, TENSOR),
    "dp": ({"dp": 2}, TENSOR),
    "dp, sp": ({"dp": 2, "tp": 2}, TENSOR),
}
SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": partial(interleaved, num_virtual=2),
    "zb-h1": zero_bubble_h1,
    "zb-v": zero_bubble_v,
}
MICROBATCHES = 4
STEPS = 3


def batches() -> list[dict[str, Tensor]]:
    """Microbatches with masks of very different weight."""
    g = torch.Generator().manual_seed(1)
    out = []
    for rate in (0.1, 0.5, 0.9, 0.7):
        tokens, labels = torch.randint(0, 50, (2, 4, 8), generator=g)
        weights = (torch.rand(4, 8, generator=g) > rate).float()
        out.append({"tokens": tokens, "labels": labels, "weights": weights})
    return out


def run(cfg: GPTConfig, layout: Layout, comm=None, steps: int = STEPS):
    """Train; return (loss, norm) per step, the first step's gradients and an evaluation."""
    model = gpt(cfg, batch_size=4, dtype=torch.float64)
    step = train_step(model, layout, adamw(1e-2), comm=comm, max_norm=0.5)
    state = step.init(0)
    local = [step.local(b) for b in batches()]
    step.gradients(local)  # read before an update: the optimizer's kernel may scale them in place
    grads = {
        (leaf.path, layer): view.clone()
        for group in step.groups
        for leaf, layer, view in group.rows(step.gradients.sums.stored[group.name])
    }
    seen = []
    for _ in range(steps):
        state, metrics = step(state, local)
        seen.append((metrics.loss.item(), metrics.grad_norm.item()))
    return seen, grads, step.evaluate([step.local(b) for b in batches()])["loss"].item()


@cache
def alone(cfg: GPTConfig, steps: int = STEPS):
    """What one device computes."""
    return run(cfg, Layout(), steps=steps)


def same_steps(seen: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    """Losses and norms of all steps, in float64 (a plain `torch.tensor` would round them)."""
    assert len(seen) == len(expected)
    assert_leaves_close(
        {str(n): torch.tensor(pair, dtype=torch.float64) for n, pair in enumerate(seen)},
        {str(n): torch.tensor(pair, dtype=torch.float64) for n, pair in enumerate(expected)},
    )


def check(cfg: GPTConfig, layout: Layout, steps: int = STEPS) -> None:
    expected, whole, evaluated = alone(cfg, steps)
    specs = {path: ty.spec for path, ty in lower_model(
        gpt(cfg, batch_size=4, dtype=torch.float64), layout
    ).types.items()}  # fmt: skip
    largest = max(g.norm() for g in whole.values())
    found = set()
    for (seen, grads, value), coords in Threads(layout.mesh.sizes).run(
        lambda comm: (run(cfg, layout, comm, steps), comm.coords)
    ):
        same_steps(seen, expected)
        assert value == pytest.approx(evaluated, rel=1e-12)
        for key, grad in grads.items():
            mine = cut(whole[key], specs[key[0]], layout.sizes, coords)
            assert (grad - mine).norm() <= 1e-12 * max(mine.norm(), 1e-2 * largest), key
        found |= set(grads)
    assert found == set(whole)  # no layer is lost between the stages


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_equals_one_device(name: str) -> None:
    """Losses, clipped norms and gradients of three updates, tied table on two stages."""
    check(GPT2, Layout(Mesh(pp=2), schedule=SCHEDULES[name]))


@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_a_pipeline_mixes_with_tensor_sequence_and_data_parallelism(name: str) -> None:
    check(GPT2, Layout(Mesh(pp=2, dp=2, tp=2), TENSOR, schedule=SCHEDULES[name]))


@pytest.mark.full
@pytest.mark.parametrize("cfg", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_all_schedules_meshes_and_models(name: str, pp: int, mix: str, cfg: GPTConfig) -> None:
    """Ten updates of every schedule on every mesh."""
    if pp == 4 and name in ("interleaved", "zb-v"):
        cfg = replace(cfg, num_layers=8)
    sizes, rules = MIXES[mix]
    check(cfg, Layout(Mesh(pp=pp, **sizes), rules, schedule=SCHEDULES[name]), steps=10)


def test_two_ranks_with_two_virtual_stages_are_exact() -> None:
    """Next and previous stage are one peer there: unordered sends give silently wrong gradients."""
    check(LLAMA, Layout(Mesh(pp=2), schedule=partial(interleaved, num_virtual=2)))


def test_uneven_stages_and_a_stage_without_layers() -> None:
    """A stage between others that has no layer hands the carry and its gradient on."""
    placement = Placement(layers_per_stage=(3, 0, 1, 0))
    check(GPT2, Layout(Mesh(pp=4), placement=placement, schedule=one_f_one_b))


@ranks(2)
def test_processes_run_a_split_schedule_exactly() -> None:
    """Real messages: gloo sends and receives in the global order."""
    layout = Layout(Mesh(pp=2), schedule=zero_bubble_h1)
    expected, whole, _ = alone(GPT2)
    seen, grads, _ = run(GPT2, layout, ProcessComm(layout.mesh))
    same_steps(seen, expected)
    largest = max(g.norm() for g in whole.values())
    for key, grad in grads.items():
        assert (grad - whole[key]).norm() <= 1e-12 * max(whole[key].norm(), 1e-2 * largest), key


PLACED: dict[str, Layout] = {
    "one device": Layout(),
    "pp2 tp2": Layout(Mesh(pp=2, tp=2), TENSOR, schedule=zero_bubble_h1),
    "tp4": Layout(Mesh(tp=4), TENSOR),
    "dp2": Layout(Mesh(dp=2), Rules(batch="dp")),
    "pp4": Layout(Mesh(pp=4), schedule=one_f_one_b),
    "pp2 tp2, uneven, virtual": Layout(
        Mesh(pp=2, tp=2), TENSOR,
        Placement(layers_per_stage=(2, 1, 0, 1)), partial(interleaved, num_virtual=2),
    ),
}  # fmt: skip


def on_ranks(layout: Layout, fn: Callable[[TrainStep, World], Any]) -> list[Any]:
    """Run `fn(step, world)` on every rank of a layout."""
    model = gpt(GPT2, batch_size=4, dtype=torch.float64)
    if layout.mesh.num_ranks == 1:
        return [fn(train_step(model, layout, adamw(1e-2)), World.single())]
    worlds = threaded_worlds(layout.mesh.num_ranks)
    return Threads(layout.mesh.sizes).run(
        lambda comm: fn(train_step(model, layout, adamw(1e-2), comm=comm), worlds[comm.rank])
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pp2 tp2", ("dp2", "pp4")),
        ("pp4", ("tp4", "pp2 tp2, uneven, virtual")),
        pytest.param("pp2 tp2, uneven, virtual", ("pp4", "tp4"), marks=pytest.mark.full),
    ],
)
def test_a_checkpoint_loads_under_another_placement_and_tp(
    tmp_path, before: str, after: tuple[str, ...]
) -> None:
    """The stored arrays know no stage and no shard: a run goes on as the one that stayed does.

    Each hop saves again, so the last file has been cut in every one of the ways.
    """
    local = lambda step: [step.local(b) for b in batches()]  # noqa: E731

    def first(step: TrainStep, world: World) -> None:
        state, _ = step(step.init(0), local(step))
        pieces.save(str(tmp_path / "0"), step, state, world)

    def go_on(step: TrainStep, world: World, hop: int) -> tuple[float, float]:
        state, _ = pieces.load(str(tmp_path / str(hop - 1)), step, world)
        state, metrics = step(state, local(step))
        pieces.save(str(tmp_path / str(hop)), step, state, world)
        return metrics.loss.item(), metrics.grad_norm.item()

    def stay(step: TrainStep, world: World) -> list[tuple[float, float]]:
        state, _ = step(step.init(0), local(step))
        seen = []
        for _ in (*after, "one device"):
            state, metrics = step(state, local(step))
            seen.append((metrics.loss.item(), metrics.grad_norm.item()))
        return seen

    (expected,) = on_ranks(Layout(), stay)
    on_ranks(PLACED[before], first)
    for hop, name in enumerate((*after, "one device"), 1):
        for seen in on_ranks(PLACED[name], partial(go_on, hop=hop)):
            same_steps([seen], [expected[hop - 1]])


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Layout(Mesh(pp=2)), r"mesh has pp=2 and no schedule"),
        (lambda: Layout(Mesh(pp=2), Rules(batch="pp"), schedule=gpipe), r"stages are placed, not"),
        (
            lambda: lower_model(gpt(LLAMA, batch_size=4), Layout(Mesh(pp=8), schedule=gpipe)),
            r"4 layers over 8 stages leaves a stage without layers",
        ),
        (
            lambda: lower_model(
                gpt(LLAMA, batch_size=4),
                Layout(Mesh(pp=2), placement=Placement(layers_per_stage=(3, 3)), schedule=gpipe),
            ),
            r"places 6 layers, the model has 4",
        ),
        (
            lambda: Layout(Mesh(pp=2), schedule=gpipe(2, 4)).schedule_for(8),
            r"is for 2 ranks and 4 microbatches, the mesh has pp=2 and the step 8",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_any_process(build, text: str) -> None:
    with pytest.raises(ShardingError, match=text):
        build()
