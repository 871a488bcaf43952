"""A config that contradicts itself is refused, with the smallest change that mends it."""

from dataclasses import replace
from typing import Any

import pytest

from megatree.recipes.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    megatron_rules,
)
from megatree.recipes.presets import demo


def changed(**groups: Any) -> RunConfig:
    """Return the demo's config with fields of `data` and `train`, or whole groups, replaced."""
    cfg = demo()
    for name in ("data", "train"):
        groups[name] = replace(getattr(cfg, name), **groups.get(name, {}))
    return replace(cfg, **groups)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: changed(train={"global_batch": 24}),
            "train.global_batch: 24 sequences are no whole number of microbatches of 16. "
            "Set train.global_batch to 32, or train.microbatch to 8.",
        ),
        (
            lambda: changed(train={"eval_samples": 0}),
            "train.eval_samples: 0, but train.eval_every is 100. "
            "Set train.eval_samples to 16, or train.eval_every to 0.",
        ),
        (
            lambda: changed(mesh=MeshConfig(dp=3, tp=2)),
            "train.microbatch: 16 sequences do not divide over 3 ranks (dp=3 tp=2). "
            "Set train.microbatch to 18, or use fewer ranks for the batch.",
        ),
        (
            lambda: changed(mesh=MeshConfig(dp=2, tp=1)),
            "rules.seq_res: cut by tp, which has one rank (dp=2 tp=1); sequence parallelism goes "
            "with tensor parallelism. Leave rules.seq_res empty, or set mesh.tp to 2 or more.",
        ),
        (
            lambda: changed(rules={**megatron_rules(), "ffn": ("tpp",)}),
            "rules.ffn: the mesh has no axis 'tpp' (did you mean 'tp'?). Use dp or tp.",
        ),
        (
            lambda: changed(mesh=MeshConfig(dp=2, tp=2), rules={"ffn": ("tp",)}),
            "mesh.dp: 2 ranks, and no rule names 'dp': all would do the same work. "
            "Set mesh.dp to 1, or name it in a rule.",
        ),
        (
            lambda: changed(data={"split": "1,0"}),
            "data.split: '1,0' holds nothing out, but train.eval_every is 100. "
            "Set data.split to 969,30,1, or train.eval_every to 0.",
        ),
        (
            lambda: MeshConfig(tp=0),
            "mesh.tp: 0. Give at least 1.",
        ),
        (
            lambda: DataConfig(prefix=("a",), text="demo"),
            "data.text: 'demo' beside 1 words of data.prefix. "
            'Set data.text to "" to train on files, or leave data.prefix out.',
        ),
        (
            lambda: DataConfig(text="demo", kind="chat"),
            "data.kind: needs files. Name them in data.prefix.",
        ),
        (
            lambda: DataConfig(prefix=("a",), kind="packed", reset_attention=True),
            "data.reset_attention: rows of kind 'packed' do not know it. Leave it out, or set "
            "data.kind to gpt.",
        ),
        (
            lambda: DataConfig(seed=1 << 32),
            "data.seed: 4294967296 is out of range. Use one in [0, 2**32).",
        ),
        (
            lambda: DataConfig(samples=-1),
            "data: samples -1 and deadline_s 3600 count things. "
            "Give at least 0 samples, and a second or more.",
        ),
        (
            lambda: DataConfig(fim_rate=1.5),
            "data.fim_rate: 1.5 is no share. Use one in [0, 1].",
        ),
        (
            lambda: OptimizerConfig(lr=1e-3, min_lr=1e-2),
            "optimizer.min_lr: 0.01 is not between 0 and optimizer.lr 0.001. "
            "Set optimizer.min_lr to at most 0.001.",
        ),
        (
            lambda: OptimizerConfig(lr=1e-3, betas=(0.9, 1.0)),
            "optimizer.betas: (0.9, 1.0) are not decays. Use two in [0, 1).",
        ),
        (
            lambda: OptimizerConfig(lr=1e-3, clip=0.0),
            "optimizer.clip: no norm is below 0.0. Use a positive one, or None.",
        ),
        (
            lambda: TrainConfig(steps=0, global_batch=1, microbatch=1),
            "train.steps: 0. Give at least 1.",
        ),
        (
            lambda: TrainConfig(steps=1, global_batch=1, microbatch=1, seed=-1),
            "train.seed: -1 is out of range. Use one in [0, 2**63).",
        ),
        (
            lambda: CheckpointConfig(every=5),
            "checkpoint.dir: empty, but checkpoint.every is 5. "
            "Name a folder, or set checkpoint.every to 0.",
        ),
        (
            lambda: CheckpointConfig(resume=""),
            'checkpoint.resume: empty. Use "auto", "never" or a checkpoint.',
        ),
    ],
)
def test_a_contradiction_is_refused_with_its_fix(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        build()
    assert str(caught.value) == message


def test_the_fixes_that_refusals_name_are_accepted() -> None:
    """A fix that is refused in turn would send the user in circles."""
    changed(train={"global_batch": 32})
    changed(train={"global_batch": 24, "microbatch": 8, "eval_samples": 8})
    of_18 = {"microbatch": 18, "global_batch": 18, "eval_samples": 18}
    changed(mesh=MeshConfig(dp=3, tp=2), train=of_18)
    changed(mesh=MeshConfig(dp=2, tp=1), rules=megatron_rules())


def test_default_rules_cut_the_sequence_over_tp_only_when_asked() -> None:
    assert megatron_rules()["seq"] == megatron_rules()["seq_res"] == ("cp",)
    assert megatron_rules(sequence_parallel=True)["seq_res"] == ("cp", "tp")
    assert megatron_rules(sequence_parallel=True).keys() == megatron_rules().keys()
