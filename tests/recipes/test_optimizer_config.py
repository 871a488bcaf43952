"""What a recipe says of optimizer, precision, storage and ramp is what the step does."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatree.parallel.loss_scale import DynamicLossScale, StaticLossScale
from megatree.parallel.remat import Remat
from megatree.parallel.storage import Storage
from megatree.recipes.build import (
    layout_of_run,
    model_of,
    moments_of,
    optimizer_of,
    precision_of,
    rules_of,
    schedule_of,
)
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.optimizer_config import (
    LrConfig,
    OptimizerConfig,
    PrecisionConfig,
    RampConfig,
    RematConfig,
    StorageConfig,
)
from megatree.recipes.presets import RECIPES


def demo(**changes: Any) -> RunConfig:
    return replace(RECIPES["demo"](), **changes)


def optimizer(**changes: Any) -> RunConfig:
    return demo(optimizer=OptimizerConfig(lr=1.0, **changes))


@pytest.mark.parametrize(
    ("kind", "entries"),
    [("adamw", {"m", "v"}), ("sgd", {"momentum"}), ("lion", {"m"}), ("muon", {"muon", "m", "v"})],
)
def test_every_optimizer_is_the_one_that_was_named(kind: str, entries: set[str]) -> None:
    state = optimizer_of(optimizer(kind=kind)).init({"a": torch.zeros(1, 4)})
    assert set(state) == entries
    kept = optimizer_of(optimizer(kind=kind, ema=0.9)).init({"a": torch.zeros(1, 4)})
    assert set(kept) == {*entries, "ema"}


def test_moments_may_be_narrow() -> None:
    cfg = optimizer(moments="bfloat16", betas=(0.9, 0.95))
    state = optimizer_of(cfg).init({"a": torch.zeros(1, 4)})
    assert {x["a"].dtype for x in state.values()} == {torch.bfloat16}
    assert moments_of(cfg) == (torch.bfloat16, torch.bfloat16)


def test_leaves_have_the_multipliers_of_their_patterns() -> None:
    cfg = optimizer(kind="muon", lr_of={"embed.*": 0.5}, no_decay=("*.wq",))
    rule = rules_of(cfg, model_of(cfg))
    assert (rule("embed.table", 2).lr, rule("embed.table", 2).matrix) == (0.5, False)
    assert (rule("blocks.dense.wq", 4).decay, rule("blocks.dense.wq", 4).matrix) == (0.0, True)
    assert not rule("blocks.dense.wo", 4).columns_are_inputs
    assert rule("blocks.dense.norm1", 1).decay == 0.0
    wrong = optimizer(lr_of={"embd.*": 0.5})
    with pytest.raises(ValueError, match="1 of 1 patterns match none"):
        rules_of(wrong, model_of(wrong))


def test_the_rate_is_counted_in_steps_or_in_samples() -> None:
    steps = demo().train.steps
    linear = schedule_of(optimizer(schedule=LrConfig(decay="linear")))
    assert linear(steps // 2) == pytest.approx(0.5)
    shape = LrConfig(decay="linear", samples=16 * steps // 2, warmup_samples=16 * 10)
    by_samples = schedule_of(optimizer(schedule=shape))
    assert [by_samples(n) for n in (0, 10, steps // 2)] == pytest.approx([0.0, 1.0, 0.0])
    wsd = schedule_of(optimizer(schedule=LrConfig(decay="wsd", anneal_fraction=0.1)))
    assert wsd(int(0.9 * steps)) == 1.0
    assert wsd(steps) == 0.0


def test_the_loss_is_scaled_where_the_numbers_are_float16() -> None:
    assert precision_of(demo()).loss_scale is None
    assert precision_of(demo(dtype="float16")).loss_scale == DynamicLossScale()
    fixed = demo(dtype="float16", precision=PrecisionConfig(loss_scale="512"))
    assert precision_of(fixed).loss_scale == StaticLossScale(scale=512.0)
    narrow = precision_of(demo(dtype="float16", precision=PrecisionConfig(grads="float16")))
    assert (narrow.grads, narrow.main_grads) == (torch.float16, True)


def test_storage_and_recomputation_are_part_of_the_layout() -> None:
    mesh = MeshConfig(dp=2, tp=2)
    cfg = demo(mesh=mesh, storage=StorageConfig(zero=2), remat=RematConfig(policy="full"))
    assert layout_of_run(cfg).storage == Storage(grads="dp", opt="dp")
    assert layout_of_run(cfg).remat == Remat(policy="full")
    further = demo(mesh=mesh, storage=StorageConfig(opt=("dp", "tp")))
    assert layout_of_run(further).storage == Storage(opt=("dp", "tp"))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: demo(storage=StorageConfig(opt=("data",))),
            "storage.opt: the mesh has no axis 'data' to cut over. Use dp or tp.",
        ),
        (
            lambda: StorageConfig(zero=1, opt=("dp",)),
            "storage.zero: 1 says what is cut over dp, ep and cp, and axes are given too. Set "
            "storage.zero to 0, or leave the axes out.",
        ),
        (
            lambda: PrecisionConfig(loss_scale="big"),
            "precision.loss_scale: 'big'. Use auto, dynamic, none or a positive number.",
        ),
        (
            lambda: demo(
                train=replace(demo().train, microbatch=8),
                precision=PrecisionConfig(grads="bfloat16"),
            ),
            "precision.grads: bfloat16 sums of 2 microbatches lose the small terms. Set "
            "precision.grads to float32, or train.microbatch to 16.",
        ),
        (
            lambda: replace(demo().train, ramp=RampConfig(start=6, increment=5, samples=100)),
            "batch_ramp.start: 6 makes a batch of 6 sequences, no whole number of microbatches of "
            "16. Set start to 16, or microbatch to 1.",
        ),
        (
            lambda: LrConfig(warmup_steps=3, warmup_fraction=0.1),
            "optimizer.schedule: warmup_steps and warmup_fraction both say how long the warm-up "
            "is. Keep warmup_steps.",
        ),
        (
            lambda: OptimizerConfig(lr=1.0, warmup_steps=2, schedule=LrConfig(warmup_steps=3)),
            "optimizer.warmup_steps: 2, and optimizer.schedule has a warm-up of its own. Keep one.",
        ),
        (
            lambda: OptimizerConfig(lr=1.0, end_weight_decay=0.05),
            "optimizer.end_weight_decay: 0.05 is below weight_decay 0.1. Set it to at least 0.1.",
        ),
    ],
)
def test_contradictions_are_refused(build: Any, text: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
        build()
    assert str(error.value) == text
