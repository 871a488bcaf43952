"""Recipes are the models they say they are, can be saved, and lower for their meshes."""

from dataclasses import replace

import pytest

from megatree.cli.plan import plan_of
from megatree.parallel.model import lower_model
from megatree.parallel.plan import A100_SXM, H100_SXM, estimate
from megatree.recipes.build import layout_of, layout_of_run, model_of, schedule_of
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.presets import RECIPES

COUNTS = {
    "demo": 922_752,
    # `GPT2LMHeadModel` of openai-community/gpt2 and gpt2-medium, the tied table counted once.
    "gpt2-small": 124_439_808,
    "gpt2-345m": 354_823_168,
    "llama-1b": 956_368_896,
    # meta-llama/Llama-2-7b-hf.
    "llama-7b": 6_738_415_616,
    # Narayanan et al. 2021 give 174.6 B for these sizes.
    "gpt3-175b": 174_604_259_328,
    # meta-llama/Meta-Llama-3-8B, -70B and Meta-Llama-3.1-405B.
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}


def model_with(name: str, **changes: object) -> int:
    cfg = RECIPES[name]()
    return model_of(replace(cfg, model=replace(cfg.model, **changes))).num_params  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_number_of_parameters(name: str) -> None:
    assert model_of(RECIPES[name]()).num_params == COUNTS[name]


def test_padding_is_not_counted() -> None:
    cfg = RECIPES["gpt2-small"]()
    assert cfg.model.vocab_pad == 128
    assert model_with("gpt2-small", vocab_pad=1) == COUNTS["gpt2-small"]


def test_every_size_counts() -> None:
    """The numbers above would also come out of a model that ignores, say, its biases."""
    assert model_with("gpt2-small", bias=False) < COUNTS["gpt2-small"]
    assert model_with("gpt2-small", tied=False) == COUNTS["gpt2-small"] + 50257 * 768
    assert model_with("llama-1b", num_layers=15) == COUNTS["llama-1b"] - 51_384_320


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lowers_for_its_mesh(name: str) -> None:
    """Only this sees a preset whose heads, vocabulary or microbatch do not divide."""
    cfg = RECIPES[name]()
    program = lower_model(model_of(cfg), layout_of_run(cfg))
    kinds = program.units["blocks.dense"].program.counts("forward")
    expected = {"all_gather": 2, "psum_scatter": 2} if "tp" in cfg.rules["seq_res"] else {}
    assert kinds == expected


def test_heads_that_do_not_divide_are_refused_by_the_layout() -> None:
    cfg: RunConfig = replace(RECIPES["demo"](), mesh=MeshConfig(tp=3))
    with pytest.raises(ValueError, match=r"dim \d \('kv_heads', size 4\) does not divide"):
        lower_model(model_of(cfg), layout_of(cfg.mesh, {"kv_heads": ("tp",)}))


@pytest.mark.parametrize(
    ("name", "num_ranks", "published"),
    [
        # Narayanan et al. 2021, with kernels of 2021; Grattafiori et al. 2024, table 4, last row.
        ("gpt3-175b", 1024, 0.44),
        ("llama3-405b", 16_384, 0.41),
    ],
)
def test_runs_of_thousands_of_gpus_are_planned_here(
    name: str, num_ranks: int, published: float
) -> None:
    """They fit into 80 GB, and take about the time that was published for such a run."""
    made = plan_of(RECIPES[name]())
    assert made.num_ranks == num_ranks
    assert made.peak_bytes < 79 * 2**30
    assert made.storage == "opt dp"
    mfu = estimate(made, A100_SXM if name == "gpt3-175b" else H100_SXM).mfu
    assert published * 0.9 < mfu < published * 1.2


def test_the_batch_of_gpt3_grows_and_its_rate_follows_the_steps() -> None:
    """16 to 1536 sequences over the first 5,859,375; Megatron takes no ramp in a run by steps."""
    cfg = RECIPES["gpt3-175b"]()
    batches, lr = cfg.train.batches, schedule_of(cfg)
    assert [batches.batch(n) for n in (0, 5_859_375 // 2, 5_859_375)] == [16, 768, 1536]
    assert lr(430) == pytest.approx(6e-5)
    assert lr(429_999) == pytest.approx(6e-6, rel=1e-3)
    assert lr(499_999) == 6e-6
