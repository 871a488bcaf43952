"""Recipes are the models they say they are, can be saved, and lower for their meshes."""

from dataclasses import replace

import pytest

from megatree.parallel.model import lower_model
from megatree.recipes.build import layout_of, model_of
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
    program = lower_model(model_of(cfg), layout_of(cfg.mesh, cfg.rules))
    kinds = program.units["blocks.dense"].program.counts("forward")
    expected = {"all_gather": 2, "psum_scatter": 2} if cfg.rules["seq_res"] else {}
    assert kinds == expected


def test_heads_that_do_not_divide_are_refused_by_the_layout() -> None:
    cfg: RunConfig = replace(RECIPES["demo"](), mesh=MeshConfig(tp=3))
    with pytest.raises(ValueError, match=r"dim \d \('kv_heads', size 4\) does not divide"):
        lower_model(model_of(cfg), layout_of(cfg.mesh, {"kv_heads": ("tp",)}))
