"""A run of a model with experts, from the command's config to text: on ranks as on one device."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.cli.explain import explain
from megatree.cli.plan import plan_of, print_plan
from megatree.cli.progress import show
from megatree.models.decoder import decoder
from megatree.models.moe_config import MoEConfig
from megatree.parallel.plan import DEVICES, Plan, estimate
from megatree.recipes import metrics
from megatree.recipes.config import MeshConfig, RunConfig, moe_rules
from megatree.recipes.expert_load import expert_load
from megatree.recipes.job import open_job, run
from megatree.recipes.presets import moe_demo
from megatree.recipes.sample import Sampling, sample
from megatree.recipes.saved import from_plain, load_config, to_plain
from megatree.recipes.writers import numbers
from megatree.runtime.processes import world_of_group
from tests.ranks import ranks
from tests.recipes.tiny_run import SEQ, tiny_run, with_group

CPU = torch.device("cpu")
MODEL = MoEConfig(
    vocab_size=512, seq_length=SEQ, num_layers=2, embed=16, kv_heads=2, head_dim=8, ffn=24,
    experts=4, top_k=2, expert_ffn=16, balance=0.01, z_loss=1e-3, init_std=0.2,
)  # fmt: skip
PROMPTS = ("the cat sat", "")


def moe_run(
    folder: Path,
    *,
    model: MoEConfig = MODEL,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    **train: Any,
) -> RunConfig:
    rules = moe_rules(model, sequence_parallel=mesh.tp > 1)
    return replace(tiny_run(folder, **train), model=model, mesh=mesh, rules=rules)


def silent(kind: str, fields: Mapping[str, Any]) -> None:
    """Report nothing."""


def told(folder: Path) -> list[tuple[Any, ...]]:
    """Return what a run told that no mesh may change."""
    return [
        (line["step"], line["loss"], line["terms"], json.dumps(line["experts"]["layers"]))
        for line in metrics.read(str(folder))
        if line["kind"] == "step"
    ]


BIASED = replace(
    MODEL, bias_rate=1e-3, balance_over="global", score="sigmoid", shared_ffn=16,
    overlap_shared=True,
)  # fmt: skip


def biased_run(folder: Path, mesh: MeshConfig) -> RunConfig:
    """Return 4 steps of a run in float64: no tie that another order of sums breaks."""
    cfg = moe_run(folder, model=BIASED, mesh=mesh, steps=4, eval_every=4)
    return replace(with_group(cfg, "optimizer", lr=3e-2), dtype="float64")


def text_of(cfg: RunConfig, mesh: MeshConfig) -> list[str]:
    return sample(CPU, cfg.checkpoint.dir, mesh, PROMPTS, Sampling(max_tokens=6))


@pytest.fixture
def alone(tmp_path: Path) -> tuple[list[tuple[Any, ...]], list[str]]:
    """What one device tells of the run, and the text that it makes after it."""
    folder = tmp_path / "alone"
    folder.mkdir()
    cfg = biased_run(folder, MeshConfig())
    assert run(CPU, cfg, silent) == 4
    return told(Path(cfg.checkpoint.dir)), text_of(cfg, MeshConfig())


@ranks(2, timeout_s=120.0)
def test_a_run_over_expert_ranks_is_that_of_one_device_and_goes_on_over_others(
    tmp_path: Path, alone: tuple[list[tuple[Any, ...]], list[str]]
) -> None:
    """Losses and loads of ep 2, then tp 2 from its checkpoint, against one device; text of both."""
    world = world_of_group()
    ep = world.broadcast(world.on_first(lambda: biased_run(tmp_path, MeshConfig(ep=2))))
    open_job(CPU, ep, silent).train(stop=2)
    tp = replace(ep, mesh=MeshConfig(tp=2), rules=moe_rules(BIASED, sequence_parallel=True))
    assert run(CPU, tp, silent) == 4
    whole, text = alone
    for (step, loss, terms, loads), (at, value, parts, counts) in zip(
        whole, told(Path(tp.checkpoint.dir)), strict=True
    ):
        assert step == at
        assert loss == pytest.approx(value, rel=1e-5)
        assert terms == pytest.approx(parts, rel=1e-4)
        assert loads == counts
    assert whole[-1][1] < whole[0][1] - 0.5
    for mesh in (MeshConfig(ep=2), MeshConfig(tp=2)):
        assert text_of(tp, mesh) == text


def test_a_run_tells_the_load_of_every_expert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In metrics.jsonl, for TensorBoard, and on the terminal."""
    cfg = moe_run(tmp_path, model=replace(MODEL, capacity_factor=0.5), steps=2)
    run(CPU, cfg, show)
    line = next(line for line in metrics.read(cfg.checkpoint.dir) if line["kind"] == "step")
    load = line["experts"]
    choices = 4 * SEQ * 2  # of a step and layer
    for layer in ("blocks.moe.0", "blocks.moe.1"):
        found = load["layers"][layer]
        tokens, dropped = found["tokens"], found["dropped"]
        assert sum(tokens) + sum(dropped) == choices
        assert found["drops"] == pytest.approx(sum(dropped) / choices)
        assert found["max_load"] == pytest.approx(max(tokens) * 4 / sum(tokens))
    assert load["drops"] > 0.3
    drawn = dict(numbers("step", line))
    assert drawn["step/experts/layers/blocks.moe.0/max_load"] >= 1.0
    assert drawn["step/experts/entropy"] == load["entropy"]
    assert drawn["step/terms/balance"] == line["terms"]["balance"]
    text = " ".join(capsys.readouterr().out.split())
    assert f"experts: heaviest {load['max_load']:.2f} x the mean" in text
    assert f"dropped {load['drops']:.1%}; terms: balance {line['terms']['balance']:.4f}" in text


def test_a_load_is_of_all_microbatches() -> None:
    outs = {
        "blocks.moe.load": torch.tensor([[[4.0, 0.0]], [[1.0, 3.0]]]),
        "blocks.moe.drops": torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]]),
        "blocks.moe.entropy": torch.zeros(2, 1),
        "head.norm": torch.zeros(2),
    }
    model = decoder(replace(MODEL, num_layers=1), batch_size=2, dtype=torch.float32)
    found = expert_load(outs, model)["experts"]
    assert found["layers"]["blocks.moe.0"]["tokens"] == [5, 3]
    assert found["max_load"] == 5 / 4
    assert found["min_load"] == 3 / 4
    assert found["drops"] == 2 / 10
    assert found["entropy"] == pytest.approx(0.9544, abs=1e-4)
    assert expert_load({"head.norm": torch.zeros(2)}, model) == {}


def test_a_load_is_under_the_number_of_its_layer_in_the_model() -> None:
    """The first layer is dense, and so is every other one after it; further tokens come last."""
    cfg = replace(MODEL, num_layers=5, dense_first=1, every=2, mtp=2)
    counts = {"moe": torch.arange(8.0).view(1, 2, 4), "mtp": torch.full((1, 1, 4), 9.0)}
    outs = {"blocks.moe.load": counts["moe"], "blocks.moe.drops": torch.zeros(1, 2, 4)}
    for depth in ("mtp.depth1", "mtp.depth2"):
        outs |= {f"{depth}.load": counts["mtp"], f"{depth}.drops": torch.zeros(1, 1, 4)}
    made = expert_load(outs, decoder(cfg, batch_size=2, dtype=torch.float32))["experts"]
    assert {name: layer["tokens"] for name, layer in made["layers"].items()} == {
        "blocks.moe.1": [0, 1, 2, 3],
        "blocks.moe.3": [4, 5, 6, 7],
        "mtp.depth1.5": [9, 9, 9, 9],
        "mtp.depth2.6": [9, 9, 9, 9],
    }


def test_a_config_with_experts_is_saved_and_read(tmp_path: Path) -> None:
    cfg = moe_run(tmp_path, model=replace(MODEL, router="sinkhorn", balance=None))
    assert from_plain(to_plain(cfg)) == cfg
    assert isinstance(from_plain(to_plain(cfg)).model, MoEConfig)
    run(CPU, with_group(cfg, "train", steps=1), silent)
    assert load_config(tmp_path / "run" / "config.json").model == cfg.model


@cache
def demo_plan() -> tuple[RunConfig, Plan]:
    cfg = moe_demo()
    return cfg, plan_of(cfg)


def test_a_plan_prints_what_travels_to_experts(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    cfg, made = demo_plan()
    (traffic,) = made.experts
    rows = 16 // 2 * 128 * 2  # of a rank: tokens x top_k, half of which leave it
    assert traffic.combine == rows // 2 * 128 * 4
    assert traffic.dispatch == traffic.combine + rows // 2 * 4 + 4 * 8
    assert traffic.backward == 2 * traffic.combine + rows // 2 * 4
    assert made.expert_bytes == 4 * (traffic.dispatch + traffic.combine + traffic.backward)
    assert not traffic.exact
    print_plan(Console(soft_wrap=True), made, estimate(made), DEVICES["h100"].name)
    text = capsys.readouterr().out
    assert "Expert traffic: 8.0 MiB leave a rank in a step" in text
    assert "blocks.moe: 4 layers over ep, each 0.50 MiB to the experts, 0.50 back" in text
    assert "(even loads assumed)" in text
    assert isinstance(cfg.model, MoEConfig)
    padded = replace(cfg.model, capacity_factor=1.25, pad_to_capacity=True)
    (traffic,) = plan_of(replace(cfg, model=padded)).experts
    slots = 8 * (16 // 2) * 40  # experts x sequences of a rank x capacity
    assert traffic.combine == slots // 2 * 128 * 4
    assert traffic.exact
    assert "rows padded to a capacity, exact" in str(traffic)


def test_a_plan_counts_the_products_of_the_experts_that_tokens_take() -> None:
    """6 FLOPs a token and active weight, and causal attention."""
    cfg, made = demo_plan()
    layer = 4 * 128 * 128 + 8 * 128 + 2 * 3 * 172 * 128
    weights = 4 * layer + 512 * 128
    attention = 4 * 6 * 128 * 128  # half of 12 s d
    assert made.flops_per_token == 6 * weights + attention
    assert isinstance(cfg.model, MoEConfig)
    twice = replace(cfg.model, top_k=4)
    more = plan_of(replace(cfg, model=twice)).flops_per_token - made.flops_per_token
    assert more == 6 * 4 * 2 * 3 * 172 * 128


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has none")
def test_a_plan_of_grouped_products_is_that_of_a_loop() -> None:
    """In float32, which a CPU multiplies so, and of which torch would not say the shapes."""
    cfg, made = demo_plan()
    model = replace(cfg.model, products="grouped")  # type: ignore[call-arg]
    assert plan_of(replace(cfg, model=model)).stages == made.stages


def test_a_block_with_experts_is_explained_without_being_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    explain(moe_demo())
    text = capsys.readouterr().out
    assert text.startswith("blocks.moe on dp=1 ep=2 tp=1")
    assert "local_map experts > all_to_all(ep)" in text
    assert "float32[8/ep, 172, 128]" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"mesh": MeshConfig(ep=3)},
            r"^model\.experts: 4 experts do not divide over 3 ranks \(ep, of dp=1 ep=3 tp=1\)\. "
            r"Use 2 ranks for experts, or 6 experts\.",
        ),
        (
            {"mesh": MeshConfig(ep=2), "rules": {**moe_rules(MODEL), "batch": ("dp",)}},
            r"^rules\.experts: cut by 'ep', which cuts neither rules\.batch \(dp\) nor "
            r"rules\.seq_moe \(cp tp\): its ranks would send the same tokens\. Add 'ep' to rules",
        ),
    ],
)
def test_meshes_that_experts_cannot_have_are_refused(
    change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=text):
        replace(moe_run(tmp_path), **change)


def test_expert_ranks_without_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^mesh\.ep: 2 ranks for experts, and the model has none"):
        replace(tiny_run(tmp_path), mesh=MeshConfig(ep=2), rules=moe_rules(MODEL))
