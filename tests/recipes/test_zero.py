"""`storage.zero` cuts over all ranks that take different tokens: dp, ep and cp."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.functional.param import padded_shape
from megatree.functional.tree import flatten_with_names
from megatree.parallel.layout import Layout
from megatree.parallel.model import lower_model
from megatree.parallel.packing import pack
from megatree.parallel.plan import plan
from megatree.parallel.storage import Storage
from megatree.parallel.threads import Threads
from megatree.recipes.build import layout_of
from megatree.recipes.config import MeshConfig, StorageConfig, megatron_rules, moe_rules
from megatree.recipes.optimizer_config import Zero
from megatree.recipes.presets import demo
from megatree.runtime import pieces
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import TrainStep, train_step
from tests.runtime import moe_cases, one_device, table
from tests.runtime.lowered_once import lowered_once
from tests.thread_worlds import threaded_worlds

MIXTURE = replace(moe_cases.MODELS["dropless"], num_layers=1)


def layout(mesh: MeshConfig, zero: Zero) -> Layout:
    """Return the layout of a recipe with experts, or of a dense one where none are cut."""
    rules = moe_rules(MIXTURE) if mesh.ep > 1 else megatron_rules()
    return layout_of(mesh, rules, storage=StorageConfig(zero=zero))


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        (MeshConfig(dp=2), ("dp",)),
        (MeshConfig(ep=4), ("ep",)),
        (MeshConfig(dp=2, ep=2, tp=2), ("dp", "ep")),
        (MeshConfig(dp=2, ep=2, cp=2), ("dp", "ep", "cp")),
        (MeshConfig(cp=2, tp=2), ("cp",)),
    ],
    ids=str,
)
def test_zero_is_over_all_ranks_that_take_different_tokens(
    mesh: MeshConfig, axes: tuple[str, ...]
) -> None:
    """Axes of one rank are not named: nothing is cut over them."""
    assert layout(mesh, 1).storage == Storage(opt=axes)
    assert layout(mesh, 2).storage == Storage(grads=axes, opt=axes)
    assert layout(mesh, 3).storage == Storage(axes, axes, axes)
    assert layout(mesh, 0).storage == Storage()


def test_rules_say_which_ranks_take_different_tokens() -> None:
    """A batch over tp too, as FSDP has it."""
    mesh, rules = MeshConfig(dp=2, tp=2), {"batch": ("dp", "tp")}
    assert layout_of(mesh, rules, storage=StorageConfig(zero=1)).storage.opt == ("dp", "tp")


def test_a_leaf_leaves_out_the_axes_that_cut_it_already() -> None:
    """The rest of a model has ep copies without the rules' help; of an expert there are dp."""
    where = layout(MeshConfig(dp=2, ep=2), 3)
    found: dict[str, tuple[str, ...]] = {}
    for group in pack(lower_model(moe_cases.reference(MIXTURE)[0].model, where)):
        found |= {leaf.path: group.axes("params") for leaf in group.leaves}
    experts = {"blocks.moe.w_gate", "blocks.moe.w_up", "blocks.moe.w_down"}
    assert {found[path] for path in experts} == {("dp",)}
    assert {axes for path, axes in found.items() if path not in experts} == {("dp", "ep")}


@pytest.mark.parametrize("dp", [1, 2])
def test_a_plan_says_what_zero_cuts(dp: int) -> None:
    """With dp 1 nothing was cut, and the plan said "params dp"; with dp 2, the rest had copies."""
    model = moe_cases.reference(MIXTURE)[0].model
    made = plan(model, layout(MeshConfig(dp=dp, ep=4 // dp), 3))
    axes = "dp ep" if dp > 1 else "ep"
    assert made.storage == f"params {axes}, grads {axes}, opt {axes}"
    (stage,) = made.stages
    names, leaves, _ = flatten_with_names(model.params)
    sizes = [padded_shape(x, model.sizes, name) for name, x in zip(names, leaves, strict=True)]
    assert stage.parameter_bytes == 8 * sum(math.prod(shape) for shape in sizes) // 4
    assert stage.stored_whole == ()  # experts under ep 4: cut as far as storage asks


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [(MeshConfig(tp=2), 1), (MeshConfig(pp=2, tp=2), 3), (MeshConfig(), 2)],
    ids=str,
)
def test_zero_that_would_cut_nothing_is_refused(mesh: MeshConfig, zero: Zero) -> None:
    with pytest.raises(ValueError, match="different tokens") as error:
        replace(demo(), mesh=mesh, rules=megatron_rules(), storage=StorageConfig(zero=zero))
    assert str(error.value) == (
        f"storage.zero: {zero} cuts over ranks that take different tokens, and this mesh has none "
        f"({mesh}). Set storage.zero to 0, or mesh.dp to 2 or more."
    )


@pytest.mark.parametrize(
    "mesh", [MeshConfig(dp=2, ep=2), MeshConfig(ep=2, cp=2)], ids=str
)  # fmt: skip
def test_terms_and_gradients_of_a_mixture_are_those_of_one_device(mesh: MeshConfig) -> None:
    moe_cases.assert_exact(
        *moe_cases.reference(MIXTURE), moe_cases.layout_of(layout(mesh, 3), MIXTURE)
    )


@pytest.mark.parametrize("zero", [1, 3])
def test_gradients_over_a_cut_sequence_are_those_of_one_device(zero: Zero) -> None:
    """Weights are the same on all ranks of cp, and their gradients sums over them."""
    ref = one_device.reference(table.MODELS["llama"])
    one_device.assert_like_one_device(ref, layout(MeshConfig(dp=2, cp=2), zero))


def stepped(where: Layout, comm: Any = None) -> tuple[TrainStep, Any, list[Tensor]]:
    """Train two clipped steps; return their terms and norms."""
    ref, _ = moe_cases.reference(MIXTURE)
    step = train_step(ref.model, where, adamw(1e-2), comm=comm, max_norm=0.5)
    state, seen = step.init(0), []
    for _ in range(2):
        state, told = once(step, state)
        seen += told
    return step, state, seen


def once(step: TrainStep, state: Any) -> tuple[Any, list[Tensor]]:
    batch = moe_cases.reference(MIXTURE)[0].batches[0]
    state, metrics = step(state, [step.local(batch)])
    return state, [*metrics.terms.values(), metrics.grad_norm.double()]


@cache
def alone() -> list[Tensor]:
    """Return what three steps of one device tell."""
    step, state, seen = stepped(Layout())
    return [*seen, *once(step, state)[1]]


@pytest.mark.parametrize("zero", [1, 3])
def test_steps_and_checkpoints_of_a_mixture_are_those_of_one_device(
    zero: Zero, tmp_path: Path
) -> None:
    """Two steps on dp 2 ep 2, and a third of one device from their checkpoint."""
    where = moe_cases.layout_of(layout(MeshConfig(dp=2, ep=2), zero), MIXTURE)
    worlds = threaded_worlds(4)

    def write(comm: Any) -> list[Tensor]:
        step, state, seen = stepped(where, comm)
        pieces.save(str(tmp_path / "two"), step, state, worlds[comm.rank])
        return seen

    with lowered_once():
        every = Threads(where.sizes).run(write)
    model = moe_cases.reference(MIXTURE)[0].model
    step = train_step(model, Layout(), adamw(1e-2), max_norm=0.5)
    state, _ = pieces.load(str(tmp_path / "two"), step, threaded_worlds(1)[0])
    last = once(step, state)[1]
    for seen in every:
        for got, want in zip([*seen, *last], alone(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
