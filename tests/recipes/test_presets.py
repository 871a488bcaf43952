"""Recipes are the models they say they are, can be saved, and lower for their meshes."""

from dataclasses import dataclass, replace

import pytest

from megatree.cli.plan import plan_of
from megatree.models.counts import num_active
from megatree.models.moe_config import MoEConfig
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
    "moe-demo": 2_512_000,
    # mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen3-30B-A3B.
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    # deepseek-ai/DeepSeek-V3 without the 14,848 biases of its routers, and layer 61 without its
    # copies of the tables of embedding and head.
    "deepseek-v3": 671_026_404_352 + 11_610_067_968,
    "deepseek-proxy": 225_360_000,
}


def model_with(name: str, **changes: object) -> int:
    cfg = RECIPES[name]()
    return model_of(replace(cfg, model=replace(cfg.model, **changes))).num_params  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_number_of_parameters(name: str) -> None:
    assert model_of(RECIPES[name]()).num_params == COUNTS[name]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A config.json, and what its model adds up to by arithmetic on it alone."""

    layers: int
    hidden: int
    vocab: int
    attention: int
    experts: int
    top_k: int
    expert: int
    dense: int = 0
    dense_layers: int = 0
    shared: int = 0

    def count(self, experts: int) -> int:
        """Return the parameters, with so many experts of a layer."""
        mixture = self.experts * self.hidden + 3 * self.hidden * (
            experts * self.expert + self.shared
        )
        each = self.attention + 2 * self.hidden
        dense = 3 * self.hidden * self.dense
        layers = self.layers * each + self.dense_layers * dense
        layers += (self.layers - self.dense_layers) * mixture
        return 2 * self.vocab * self.hidden + self.hidden + layers


_LATENT = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64)  # of queries
_LATENT += 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128) + 128 * 128 * 7168
PUBLISHED = {
    # 46.7 B, 12.9 B active
    "mixtral-8x7b": Published(
        layers=32, hidden=4096, vocab=32000, attention=2 * 4096 * 4096 + 2 * 4096 * 1024,
        experts=8, top_k=2, expert=14336,
    ),
    # 30.5 B, 3.3 B active
    "qwen3-30b-a3b": Published(
        layers=48, hidden=2048, vocab=151_936,
        attention=2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128, experts=128, top_k=8, expert=768,
    ),
    # 671 B, 37 B active
    "deepseek-v3": Published(
        layers=61, hidden=7168, vocab=129_280, attention=_LATENT, experts=256, top_k=8,
        expert=2048, dense=18432, dense_layers=3, shared=2048,
    ),
}  # fmt: skip
ACTIVE = {"mixtral-8x7b": 12.9, "qwen3-30b-a3b": 3.35, "deepseek-v3": 37.55}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_mixture_has_the_published_totals(name: str) -> None:
    cfg, published = RECIPES[name](), PUBLISHED[name]
    model = model_of(replace(cfg, model=replace(cfg.model, mtp=None)))
    assert model.num_params == published.count(published.experts)
    assert num_active(model) == published.count(published.top_k)
    assert num_active(model) / 1e9 == pytest.approx(ACTIVE[name], abs=0.03)


def test_what_predicts_further_adds_a_layer_and_a_product() -> None:
    cfg = RECIPES["deepseek-v3"]()
    alone = model_of(replace(cfg, model=replace(cfg.model, mtp=None)))
    published = PUBLISHED["deepseek-v3"]
    one_more = replace(published, layers=62)
    layer = one_more.count(256) - published.count(256)
    joint = 2 * 7168 * 7168 + 3 * 7168
    assert model_of(cfg).num_params - alone.num_params == layer + joint
    # With the two tables, which files hold once more, the 14 B of the model's card.
    assert (layer + joint + 2 * 129_280 * 7168) / 1e9 == pytest.approx(13.5, abs=0.1)


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
    if isinstance(cfg.model, MoEConfig):
        kinds = program.units["blocks.moe"].program.counts("forward")
        assert any(kind.startswith("all_to_all") for kind in kinds) == (cfg.mesh.ep > 1)
        return
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
