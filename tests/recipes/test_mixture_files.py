"""Files of mixtures of experts: through a mesh to the same bits, and text as transformers' own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from megatree.functional.param import init
from megatree.io.checkpoint import Piece, save
from megatree.io.world import World
from megatree.models.decoder import decoder
from megatree.models.hugging_face import copies_in, to_gpt_config, to_hf_config
from megatree.models.moe_config import MoEConfig
from megatree.parallel.comm import OneDevice, RankComm
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import one_f_one_b
from megatree.parallel.threads import ThreadComm, Threads
from megatree.recipes.convert import Options, convert
from megatree.recipes.formats import open_checkpoint, run_config
from megatree.recipes.inspect import differences
from megatree.recipes.name_map import declared
from megatree.recipes.presets import RECIPES
from megatree.recipes.saved import to_plain
from megatree.runtime import pieces
from megatree.runtime.generate import greedy, load_generator
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.io.formats.in_memory import assert_same
from tests.recipes.foreign import CONFIGS, tensors_of, their_model
from tests.thread_worlds import threaded_worlds

STEP = "step_00000000"


FAMILIES = ("mixtral", "qwen3 moe", "deepseek")


def meshed(cfg: MoEConfig, *, pipeline: bool = True) -> Layout:
    """Return tp2 x ep2 x pp2, or ep2."""
    if not pipeline:
        return Layout(Mesh(ep=2), Rules(batch="ep", experts="ep"))
    rules: dict[str, Any] = {"batch": "ep", "experts": "ep", "kv_heads": "tp", "seq_res": "tp"}
    rules |= {"seq_moe": "tp"} | ({"ffn": "tp"} if "dense" in cfg.pattern else {})
    rules |= {} if cfg.shared_ffn is None else {"shared_ffn": "tp"}
    return Layout(Mesh(pp=2, ep=2, tp=2), Rules(**rules), schedule=one_f_one_b)


def model_in(folder: Path) -> MoEConfig:
    cfg = open_checkpoint(folder).model
    assert isinstance(cfg, MoEConfig)
    return cfg


def theirs(name: str, dtype: torch.dtype) -> Any:
    """Return a random model of theirs, whose routers' bias is float32 as published."""
    net = their_model(name).to(dtype)
    for key, buffer in net.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    return net


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("deepseek", "ep2"),
        *(pytest.param(x, "mesh", marks=pytest.mark.full) for x in FAMILIES),
    ],
)
def test_files_go_through_a_mesh_and_keep_every_bit(name: str, where: str, tmp_path: Path) -> None:
    """Their bfloat16 files, read by 2 or 8 ranks, saved by them, and written as files again."""
    net = theirs(name, torch.bfloat16)
    net.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options())
    cfg = model_in(tmp_path / "hf")
    layout = meshed(cfg, pipeline=where == "mesh")
    worlds = threaded_worlds(layout.mesh.num_ranks)
    model = decoder(cfg, batch_size=2, dtype=torch.bfloat16)

    def rank_main(comm: ThreadComm) -> None:
        step = train_step(model, layout, adamw(1e-2), comm=comm)
        loaded = pieces.load_weights(str(tmp_path / "ours" / STEP), step, worlds[comm.rank])
        extra = {"config": json.loads((tmp_path / "ours" / "config.json").read_text())}
        path = str(tmp_path / "meshed" / "step_00000001")
        pieces.save(path, step, loaded.state, worlds[comm.rank], extra=extra)

    (tmp_path / "meshed").mkdir()
    Threads(layout.mesh.sizes).run(rank_main)
    options = Options(target="hf", weights_only=True, shard_bytes=20_000)
    convert(str(tmp_path / "meshed"), str(tmp_path / "back"), options)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    assert model_in(tmp_path / "back") == cfg


@pytest.mark.parametrize("where", ["one device", pytest.param("mesh", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "name", ["deepseek", *(pytest.param(x, marks=pytest.mark.full) for x in FAMILIES[:2])]
)
def test_greedy_text_is_that_of_transformers(name: str, where: str, tmp_path: Path) -> None:
    """Theirs keeps what it has seen (of DeepSeek, latents), ours computes all of it anew."""
    net = theirs(name, torch.float64)
    net.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options())
    prompts = [[5, 11, 23, 42], [7, 3]]
    expected = [
        net.generate(torch.tensor([row]), max_new_tokens=10, do_sample=False)[0].tolist()
        for row in prompts
    ]
    expected = [row[len(prompt) :] for prompt, row in zip(prompts, expected, strict=True)]
    cfg = model_in(tmp_path / "hf")
    layout = meshed(cfg) if where == "mesh" else Layout()
    model = decoder(cfg, batch_size=2, dtype=torch.float64).up_to("head")
    model = model.with_sizes(seq=16, seq_res=16, seq_moe=16)

    def rank_main(comm: RankComm, world: World) -> list[list[int]]:
        step = str(tmp_path / "ours" / STEP)
        return load_generator(step, model, layout, comm=comm, world=world)(prompts, 10, greedy)

    if where == "one device":
        assert rank_main(OneDevice(), World.single()) == expected
        return
    worlds = threaded_worlds(8)
    for got in Threads(layout.mesh.sizes).run(lambda comm: rank_main(comm, worlds[comm.rank])):
        assert got == expected


def written(folder: Path) -> tuple[MoEConfig, dict[str, Tensor]]:
    """Write a checkpoint of ours that predicts a token further; return its leaves."""
    cfg = to_gpt_config(CONFIGS["deepseek"].to_dict(), "config.json")
    assert isinstance(cfg, MoEConfig)
    cfg = replace(cfg, mtp=1)
    model = decoder(cfg, batch_size=1)
    tree = init(model.params, model.sizes, seed=3)
    leaves = dict(zip(declared(model), optree.tree_leaves(tree), strict=True))
    axes = {path: leaf.axes for path, leaf in declared(model).items()}
    extra = {"config": to_plain(run_config(cfg, torch.float32))}
    save(
        str(folder / "ours" / STEP),
        [Piece.whole(f"params.{path}", x, axes[path]) for path, x in leaves.items()],
        world=World.single(),
        extra=extra,
    )
    return cfg, leaves


def test_what_predicts_further_is_in_the_files(tmp_path: Path, monkeypatch: Any) -> None:
    """Behind the decoder's layers, with copies of both tables; transformers reads it from there."""
    (tmp_path / "ours").mkdir()
    cfg, leaves = written(tmp_path)
    convert(str(tmp_path / "ours"), str(tmp_path / "files"), Options(target="hf"))
    held = tensors_of(tmp_path / "files")
    copies = copies_in(cfg)
    assert sorted(copies) == [
        f"model.layers.3.{x}.weight" for x in ("embed_tokens", "shared_head.head")
    ]
    assert all(torch.equal(held[copy], held[name]) for copy, name in copies.items())
    assert model_in(tmp_path / "files") == cfg
    convert(str(tmp_path / "files"), str(tmp_path / "again"), Options())
    assert (
        list(differences(open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "again")))
        == []
    )
    layers = [r"model\.layers\.3.*"]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", layers)
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "files")
    further = MtpModel.from_pretrained(net).state_dict()
    for name in ("norm_token", "norm_hidden", "norm_out", "wq_down"):
        theirs = {"norm_token": "enorm", "norm_hidden": "hnorm", "norm_out": "post_norm",
                  "wq_down": "mtp_block.self_attn.q_a_proj"}[name]  # fmt: skip
        assert torch.equal(further[f"layers.0.{theirs}.weight"], leaves[f"mtp.depth1.{name}"][0])
    both = torch.cat([leaves["mtp.depth1.w_token"][0], leaves["mtp.depth1.w_hidden"][0]], 1)
    assert torch.equal(further["layers.0.eh_proj.weight"], both)
    experts = torch.cat([leaves["mtp.depth1.w_gate"][0], leaves["mtp.depth1.w_up"][0]], 1)
    assert torch.equal(further["layers.0.mtp_block.mlp.experts.gate_up_proj"], experts)
    # Text is made without it, from the same checkpoint.
    model = decoder(cfg, batch_size=1).up_to("head").with_sizes(seq=8, seq_res=8, seq_moe=8)
    step, one = str(tmp_path / "ours" / STEP), OneDevice()
    generator = load_generator(step, model, Layout(), comm=one, world=World.single())
    ours = generator([[1, 2, 3]], 4, greedy)[0]
    net.set_experts_implementation("eager")
    assert (
        net.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
        == ours
    )
    held["model.layers.3.shared_head.head.weight"][0, 0] += 1
    save_file(held, tmp_path / "files" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"shared_head\.head\.weight is stored beside lm_head"):
        open_checkpoint(tmp_path / "files")


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
"""What the published config.json says, but for its float8 weights."""


def test_the_published_config_is_the_preset_s_model() -> None:
    cfg = to_gpt_config(DEEPSEEK, "config.json")
    assert cfg.yarn == (40.0, 32.0, 1.0, 4096.0, 1.0, 1.0)
    assert isinstance(cfg, MoEConfig)
    preset = RECIPES["deepseek-v3"]().model
    own: dict[str, Any] = {"seq_length": 4096, "yarn": None, "init_std": 0.006, "fused_loss": True,
           "balance": 1e-4, "balance_over": "sequence"}  # fmt: skip
    assert replace(cfg, **own) == preset
    again = to_hf_config(cfg, "bfloat16")
    assert to_gpt_config(again, "config.json") == cfg
    odd = {k for k, v in DEEPSEEK.items() if again.get(k, v) != v}
    assert odd <= {"torch_dtype"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config is .*only None"),
        ({"topk_method": "greedy"}, r"topk_method is 'greedy', and only 'noaux_tc' is computed"),
        ({"num_experts_per_tok": 6}, r"num_experts_per_tok is 6 with topk_group 4\..*_tok 8\."),
        ({"num_key_value_heads": 8}, r"8 key heads for 128 heads\. Give as many of both\."),
        ({"rope_scaling": {"type": "linear"}}, r"rope_type is 'linear', and only 'default' and"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        to_gpt_config({**DEEPSEEK, **changes}, "config.json")


def test_layers_that_are_dense_by_name_are_refused() -> None:
    config = CONFIGS["qwen3 moe"].to_dict()
    with pytest.raises(ValueError, match=r"mlp_only_layers is \[1\], and only \[\] is computed"):
        to_gpt_config({**config, "mlp_only_layers": [1]}, "config.json")
