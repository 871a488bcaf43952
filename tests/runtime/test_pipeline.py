"""Pipelines against one device: every schedule, placement and mix; messages, tied leaves, norm."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

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
from megatree.runtime.adamw import adamw
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.step import train_step
from tests.ranks import ranks
from tests.thread_worlds import threaded_worlds

SIZES = {
    "vocab_size": 50, "seq_length": 8, "num_layers": 4, "embed": 16, "kv_heads": 4, "head_dim": 4,
    "ffn": 16, "vocab_pad": 8,
}  # fmt: skip
LLAMA = GPTConfig(**SIZES, group=2)  # type: ignore[arg-type]
GPT2 = GPTConfig(
    **SIZES, norm="layer", positions="learned", activation="gelu", bias=True, tied=True
)  # type: ignore[arg-type]
TENSOR = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
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
    seen, grads = [], {}
    for number in range(steps):
        state, metrics = step(state, [step.local(b) for b in batches()])
        seen.append((metrics.loss.item(), metrics.grad_norm.item()))
        if number == 0:
            grads = {
                (leaf.path, layer): view.clone()
                for group in step.groups
                for leaf, layer, view in group.rows(step.gradients.grads[group.name])
            }
    return seen, grads, step.evaluate([step.local(b) for b in batches()])["loss"].item()


def check(cfg: GPTConfig, layout: Layout) -> None:
    expected, whole, evaluated = run(cfg, Layout())
    specs = {path: ty.spec for path, ty in lower_model(
        gpt(cfg, batch_size=4, dtype=torch.float64), layout
    ).types.items()}  # fmt: skip
    largest = max(g.norm() for g in whole.values())
    found = set()
    for (seen, grads, value), coords in Threads(layout.mesh.sizes).run(
        lambda comm: (run(cfg, layout, comm), comm.coords)
    ):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-11, atol=0)
        assert value == pytest.approx(evaluated, rel=1e-11)
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
@pytest.mark.parametrize("mesh", [{"pp": 4}, {"pp": 2, "tp": 2}, {"pp": 2, "dp": 2}], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_all_schedules_meshes_and_models(name: str, mesh: dict[str, int], cfg: GPTConfig) -> None:
    if mesh == {"pp": 4} and name in ("interleaved", "zb-v"):
        cfg = replace(cfg, num_layers=8)
    check(cfg, Layout(Mesh(**mesh), TENSOR, schedule=SCHEDULES[name]))


def test_two_ranks_with_two_virtual_stages_are_exact() -> None:
    """Next and previous stage are one peer there: unordered sends give silently wrong gradients."""
    check(LLAMA, Layout(Mesh(pp=2), schedule=partial(interleaved, num_virtual=2)))


def test_uneven_stages_and_a_stage_without_layers() -> None:
    placement = Placement(layers_per_stage=(3, 1, 0))
    check(GPT2, Layout(Mesh(pp=3), placement=placement, schedule=one_f_one_b))


@ranks(2)
def test_processes_run_a_split_schedule_exactly() -> None:
    """Real messages: gloo sends and receives in the global order."""
    layout = Layout(Mesh(pp=2), schedule=zero_bubble_h1)
    expected, whole, _ = run(GPT2, Layout())
    seen, grads, _ = run(GPT2, layout, ProcessComm(layout.mesh))
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-11, atol=0)
    largest = max(g.norm() for g in whole.values())
    for key, grad in grads.items():
        assert (grad - whole[key]).norm() <= 1e-12 * max(whole[key].norm(), 1e-2 * largest), key


def test_a_checkpoint_of_one_placement_loads_under_another(tmp_path) -> None:
    """pp 2 to one device and back to pp 4: the stored arrays know no stage."""
    model = gpt(GPT2, batch_size=4, dtype=torch.float64)

    def values(step, state):
        return {
            (leaf.path, layer): view.clone()
            for group in step.groups
            for leaf, layer, view in group.rows(state.params[group.name])
        }

    def save_main(comm):
        step = train_step(model, Layout(Mesh(pp=2), schedule=one_f_one_b), adamw(1e-2), comm=comm)
        state, _ = step(step.init(0), [step.local(b) for b in batches()])
        return step, state

    worlds = threaded_worlds(2)
    Threads({"pp": 2}).run(
        lambda comm: pieces.save(str(tmp_path / "a"), *save_main(comm), worlds[comm.rank])
    )
    alone = train_step(model, Layout(), adamw(1e-2))
    state, _ = pieces.load(str(tmp_path / "a"), alone, World.single())
    whole = values(alone, state)
    expected, _ = alone(alone.init(0), [alone.local(b) for b in batches()])
    for key, value in values(alone, expected).items():
        torch.testing.assert_close(whole[key], value, rtol=1e-11, atol=1e-13)

    def load_main(comm):
        step = train_step(model, Layout(Mesh(pp=4), schedule=one_f_one_b), adamw(1e-2), comm=comm)
        state, _ = pieces.load(str(tmp_path / "a"), step, worlds4[comm.rank])
        return values(step, state)

    worlds4 = threaded_worlds(4)
    for held in Threads({"pp": 4}).run(load_main):
        for key, value in held.items():
            assert torch.equal(value, whole[key]), key


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
