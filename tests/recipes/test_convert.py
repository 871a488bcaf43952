"""Conversions lose no bit, and our model computes what theirs does with the same files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatree.io.checkpoint import read_manifest
from megatree.models import megatron
from megatree.models.gpt import gpt
from megatree.models.gpt_config import GPTConfig
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import one_f_one_b
from megatree.parallel.threads import ThreadComm, Threads
from megatree.recipes.config import CheckpointConfig, OptimizerConfig
from megatree.recipes.convert import Options, convert, plan_conversion
from megatree.recipes.formats import Format, open_checkpoint
from megatree.recipes.inspect import differences, lines, verify
from megatree.recipes.job import run
from megatree.recipes.saved import load_config
from megatree.runtime.generate import load_generator
from tests.io.formats.in_memory import assert_same
from tests.recipes.foreign import CONFIGS, logits, tensors_of, their_model
from tests.recipes.tiny_run import tiny_run
from tests.thread_worlds import threaded_worlds
from tests.tolerances import distance

CLOSE = 1e-6  # they compute angles, norms and softmax in float32
GOLDEN = 1e-5
STORIES = "data/weights/stories260K/hf"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = their_model(name)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model.double()(input_ids=tokens).logits
    opened = open_checkpoint(tmp_path)
    assert (opened.format, opened.unmapped) == ("hf", [])
    assert distance(logits(opened, tokens), expected) < CLOSE


def test_a_sequence_may_be_shorter_than_the_window(tmp_path: Path) -> None:
    model = their_model("mistral")
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model.double()(input_ids=tokens).logits
    assert distance(logits(open_checkpoint(tmp_path), tokens), expected) < CLOSE


@pytest.mark.parametrize(
    "name",
    [
        x if x in ("llama3", "qwen2", "gpt2") else pytest.param(x, marks=pytest.mark.full)
        for x in CONFIGS
    ],
)
def test_hf_to_megatree_to_hf_keeps_every_bit_and_the_model(name: str, tmp_path: Path) -> None:
    their_model(name).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    small = {"box_bytes": 1000}
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options(**small))
    back = Options(target="hf", shard_bytes=20_000, **small)
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), back)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert open_checkpoint(tmp_path / "back").model == open_checkpoint(tmp_path / "hf").model
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(their_model(name))


WAYS: dict[Format, Options] = {
    "megatree": Options(target="megatree", box_bytes=2000),
    "dcp": Options(target="dcp", box_bytes=2000),
    "orbax": Options(target="orbax", box_bytes=9000),
    "megatron": Options(target="megatron", tensor=2, pipeline=3, vocab_divisor=8, box_bytes=2000),
    "torch_dist": Options(target="torch_dist", vocab_divisor=8, box_bytes=2000),
}


@pytest.mark.parametrize(
    "name",
    ["qwen2", "gpt2", *(pytest.param(x, marks=pytest.mark.full) for x in ("llama2", "qwen3"))],
)
@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_back_the_same_leaves_and_model(
    way: Format, name: str, tmp_path: Path
) -> None:
    """Under other ranks than it was written, with a vocabulary of 97 that Megatron pads."""
    their_model(name).save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "there"), WAYS[way])
    first, second = open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "there")
    assert second.format == way
    assert list(differences(first, second)) == []
    assert verify(second) == []
    assert first.model is not None
    assert second.model is not None
    assert vars(second.model) | {"init_std": 0} == vars(first.model) | {"init_std": 0, "dropout": (
        0.0 if way in ("megatron", "torch_dist") else first.model.dropout
    ), "attention_dropout": (
        0.0 if way in ("megatron", "torch_dist") else first.model.attention_dropout
    )}  # fmt: skip


def test_stories260k_speaks_as_with_transformers(shared: Path, tmp_path: Path) -> None:
    folder = shared / STORIES
    convert(str(folder), str(tmp_path / "ours"), Options())
    convert(str(tmp_path / "ours"), str(tmp_path / "back"), Options(target="hf"))
    assert_same(tensors_of(tmp_path / "back"), tensors_of(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    for path in (folder, tmp_path / "ours"):
        assert distance(logits(open_checkpoint(path), tokens), expected) < CLOSE


DENSE = ("llama2", "llama3", "llama tied", "mistral", "qwen2", "qwen3", "gpt2")


def logits_on_tp2_pp2(folder: Path, tokens: torch.Tensor, last: torch.Tensor) -> list[torch.Tensor]:
    """Return what each of four ranks says of the last tokens of rows, from our own format."""
    cfg = open_checkpoint(folder).model
    assert cfg is not None
    cfg = replace(cfg, vocab_pad=2)
    rules = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    layout = Layout(Mesh(pp=2, tp=2), rules, schedule=one_f_one_b)
    worlds = threaded_worlds(4)
    batch, seq = tokens.shape

    def rank_main(comm: ThreadComm) -> torch.Tensor:
        chain = gpt(cfg, batch_size=batch, dtype=torch.float64).for_evaluation().up_to("head")
        generator = load_generator(
            str(folder / "step_00000000"),
            chain.with_sizes(seq=seq, seq_res=seq),
            layout,
            comm=comm,
            world=worlds[comm.rank],
        )
        return generator.logits(tokens, last)

    return Threads(layout.mesh.sizes).run(rank_main)


def test_stories260k_on_tp2_pp2_has_the_same_logits(shared: Path, tmp_path: Path) -> None:
    folder = shared / STORIES
    convert(str(folder), str(tmp_path / "ours"), Options(dtype=torch.float64))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(3))
    last = torch.tensor([15, 7])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[torch.arange(2), last]
    for got in logits_on_tp2_pp2(tmp_path / "ours", tokens, last):
        assert distance(got, expected) < CLOSE


@pytest.mark.parametrize(
    "name", [x if x == "gpt2" else pytest.param(x, marks=pytest.mark.full) for x in DENSE]
)
def test_random_models_on_tp2_pp2_have_the_logits_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """Three layers on two stages, a vocabulary of 97 on two ranks."""
    model = their_model(name)
    model.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options(dtype=torch.float64))
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(3))
    last = torch.tensor([15, 7])
    with torch.no_grad():
        expected = model.double()(input_ids=tokens).logits[torch.arange(2), last]
    for got in logits_on_tp2_pp2(tmp_path / "ours", tokens, last):
        assert distance(got[..., :97], expected) < CLOSE


def test_training_begins_with_converted_weights(shared: Path, tmp_path: Path) -> None:
    """`checkpoint.weights` names the result; at a learning rate of 0 it is saved as it was."""
    convert(str(shared / STORIES), str(tmp_path / "ours"), Options())
    cfg = load_config(tmp_path / "ours/config.json")
    source = open_checkpoint(tmp_path / "ours")
    assert cfg.model == source.model
    small = {"global_batch": 1, "microbatch": 1, "eval_every": 0, "eval_samples": 0}
    tiny = tiny_run(tmp_path, steps=1, **small)
    text = tmp_path / "long.jsonl"
    text.write_text(json.dumps({"text": "Once upon a time there was a cat. " * 500}))
    cfg = replace(
        tiny,
        model=cfg.model,
        data=replace(cfg.data, text=str(text), split="100"),
        optimizer=OptimizerConfig(lr=0.0),
        checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), weights=str(tmp_path / "ours")),
    )
    heard: dict[str, Any] = {}
    assert run(torch.device("cpu"), cfg, lambda kind, fields: heard.update({kind: fields})) == 1
    assert heard["start"]["weights"] == str(tmp_path / "ours")
    assert heard["step"]["loss"] < 4, "a model that was never trained has ln(512), 6.2"
    saved = open_checkpoint(tmp_path / "run", weights_only=True)
    assert list(differences(source, saved)) == []


LLAMAS = ("llama_tp2_mcore0192", "llama_tp2_mcore0161", "llama_tp2_mcore0192_legacy_plain",
          "llama_tp2_mcore0192_legacy_namespace")  # fmt: skip
GPT2S = ("gpt2_tp2pp2_mcore0192_legacy_plain", "gpt2_tp2pp2_mcore0192")


@pytest.mark.parametrize("name", LLAMAS + GPT2S)
def test_checkpoints_of_megatron_give_its_logits(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "goldens/checkpoints"
    # The golden torch_dist of GPT-2 holds no arguments.
    like = open_checkpoint(folder / GPT2S[0]).model if name == GPT2S[1] else None
    opened = open_checkpoint(folder / name, like=like)
    reference = np.load(folder / f"{name.split('_')[0]}_reference.npz")
    tokens = torch.from_numpy(reference["input/tokens"]).long()
    expected = torch.from_numpy(reference["output/logits"])
    assert distance(logits(opened, tokens, torch.float32), expected) < GOLDEN
    assert opened.unmapped == []
    options = Options(weights_only=True, like=like, box_bytes=5000)
    convert(str(folder / name), str(tmp_path / "ours"), options)
    assert not list(differences(open_checkpoint(folder / name, like=like, weights_only=True),
                                open_checkpoint(tmp_path / "ours")))  # fmt: skip


def test_the_reshardable_optimizer_of_megatron_is_read(shared: Path) -> None:
    folder = shared / "goldens/checkpoints"
    opened = open_checkpoint(folder / LLAMAS[0])
    moments = [path for path in opened.leaves if path.startswith("opt.")]
    assert len(moments) == 2 * 12
    assert opened.extra["step"] == 2
    v = opened.reader.read("opt.v.blocks.dense.wq", ((1, 2), (0, 2), (0, 2), (0, 16), (0, 64)))
    assert v.min() >= 0
    assert v.max() > 0
    # The master copies are the weights: they are left out, with a reason.
    assert set(opened.left_out.values()) == {"copies of float32 weights"}


OLD_NAMES = {
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tensor", [1, 2])
def test_old_orders_of_query_key_value_are_read(version: int, tensor: int, tmp_path: Path) -> None:
    """Before version 2: [3, heads, dim] or [heads, dim, 3] rows on every rank; old names."""
    their_model("gpt2").save_pretrained(tmp_path / "hf")
    new = Options(target="megatron", tensor=tensor, vocab_divisor=1 if tensor == 1 else 49)
    convert(str(tmp_path / "hf"), str(tmp_path / "new"), new)
    heads = 4 // tensor
    for file in (tmp_path / "new").rglob("model_optim_rng.pt"):
        held = torch.load(file, weights_only=False)
        held["checkpoint_version"] = float(version)
        layers, table = {}, held["model"].pop("embedding.word_embeddings.weight")
        positions = held["model"].pop("embedding.position_embeddings.weight")
        for name, x in held["model"].items():
            if "linear_qkv" in name:
                rows = x.unflatten(0, (heads, 3, 6))
                order = rows.movedim(1, 0) if version == 0 else rows.movedim(1, 2)
                x = order.flatten(0, 2).contiguous()
            old = name.removeprefix("decoder.")
            for today, then in OLD_NAMES.items():
                old = old.replace(today, then)
            layers[old] = x
        embedding = {"word_embeddings": {"weight": table},
                     "position_embeddings": {"weight": positions}}  # fmt: skip
        held["model"] = {"language_model": {"embedding": embedding, "transformer": layers}}
        torch.save(held, file)
    opened = open_checkpoint(tmp_path / "new")
    assert list(differences(open_checkpoint(tmp_path / "hf"), opened)) == []


def test_interleaved_stages_are_put_in_order(tmp_path: Path) -> None:
    """model0, model1 of stage 0, then of stage 1: layers 0, 2 and 1, 3."""
    cfg = GPTConfig(
        vocab_size=8, seq_length=4, num_layers=4, embed=4, kv_heads=2, head_dim=2, ffn=4
    )
    model = gpt(cfg, batch_size=1)
    shapes = {"input_layernorm.weight": (4,), "self_attention.linear_qkv.weight": (12, 4),
              "self_attention.linear_proj.weight": (4, 4), "pre_mlp_layernorm.weight": (4,),
              "mlp.linear_fc1.weight": (8, 4), "mlp.linear_fc2.weight": (4, 4)}  # fmt: skip
    args = {**megatron.to_args(cfg), "padded_vocab_size": 8}
    for stage in range(2):
        folder = tmp_path / f"mp_rank_00_{stage:03d}"
        folder.mkdir()
        chunks = {
            f"model{chunk}": {
                f"decoder.layers.0.{name}": torch.full(shape, float(chunk * 2 + stage))
                for name, shape in shapes.items()
            }
            for chunk in range(2)
        }
        if stage == 0:
            chunks["model0"]["embedding.word_embeddings.weight"] = torch.ones(8, 4)
        else:
            chunks["model1"]["decoder.final_layernorm.weight"] = torch.ones(4)
            chunks["model1"]["output_layer.weight"] = torch.ones(8, 4)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, **chunks},
                   folder / "model_optim_rng.pt")  # fmt: skip
    opened = open_checkpoint(tmp_path)
    assert len(opened.leaves) == len(opened.reader.arrays) == 12
    assert opened.reader.read("params.blocks.dense.norm1", ((0, 4), (0, 1))).tolist() == [
        [0.0], [1.0], [2.0], [3.0],
    ]  # fmt: skip
    assert model.num_params > 0


def test_meta_llama_is_read_from_two_ranks(tmp_path: Path) -> None:
    """Heads turn neighbours there; columns of the embedding are cut, rows of the products."""
    their_model("llama2").save_pretrained(tmp_path / "hf")
    theirs = tensors_of(tmp_path / "hf")
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
             "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings",
             "lm_head": "output"}  # fmt: skip
    ranks: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, x in theirs.items():
        new = name.removeprefix("model.")
        for old, other in names.items():
            new = new.replace(old, other)
        if "wq" in new or "wk" in new:
            x = x.view(4, 2, 3, 24).transpose(1, 2).reshape(24, 24)
        cut = {"tok_embeddings": 1, "wo": 1, "w2": 1}
        dim = next((d for end, d in cut.items() if end in new), 0 if x.dim() == 2 else None)
        if new == "output.weight" or new.startswith("tok"):
            x = torch.cat([x, x.new_zeros(1, 24)])
        parts = x.chunk(2, dim) if dim is not None else (x, x)
        for rank, part in zip(ranks, parts, strict=True):
            rank[new] = part.contiguous().clone()
    for number, rank in enumerate(ranks):
        torch.save(
            {**rank, "rope.freqs": torch.ones(3)}, tmp_path / f"consolidated.{number:02d}.pth"
        )
    params = {"dim": 24, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-6}
    (tmp_path / "params.json").write_text(json.dumps(params))
    opened = open_checkpoint(tmp_path)
    assert (opened.format, opened.unmapped) == ("meta", [])
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(2))
    expected = logits(open_checkpoint(tmp_path / "hf"), tokens)
    assert distance(logits(opened, tokens)[..., :97], expected) < 1e-12


def test_what_has_no_place_is_an_error_and_is_listed(shared: Path, tmp_path: Path) -> None:
    source = str(shared / "goldens/checkpoints" / LLAMAS[0])
    plan = plan_conversion(source, Options(target="hf"))
    assert len(plan.unmapped) == 24
    with pytest.raises(
        ValueError, match=r"24 leaves have no place in the target: opt.m.*--weights"
    ):
        convert(source, str(tmp_path / "hf"), Options(target="hf"))
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_no_leaf_takes_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    their_model("llama2").save_pretrained(tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    save_file({**tensors, "model.layers.0.odd": torch.ones(2)}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors have no leaf: model.layers.0.odd\."):
        convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing: model.layers.1.mlp.up_proj.wei"):
        convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_head_stored_twice_must_be_the_table(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    their_model("llama tied").save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).left_out) == ["lm_head.weight"]
    save_file({**tensors, "lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"lm_head.weight is stored beside .*: 2328 of 2328 elements differ, by 1 at most",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", {"model_type": "bloom"}, r"model_type is 'bloom'. Known are"),
        ("llama2", {"hidden_act": "gelu"}, r"hidden_act is 'gelu', and only 'silu'"),
        ("llama2", {"attention_bias": True}, r"attention_bias is True"),
        ("llama2", {"logit_softcap": 30.0}, r"logit_softcap is 30.0, a key that"),
        ("llama2", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type is 'yarn'"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window is True"),
        ("gpt2", {"activation_function": "relu"}, r"activation_function is 'relu'"),
        ("llama2", {"hidden_size": 32}, r"do not fit: .*\[24\], blocks.dense.norm1 needs \[32\]"),
    ],
)
def test_a_config_that_we_do_not_compute_is_refused(
    name: str, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    their_model(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    their_model("llama2").save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options())
    file = tmp_path / "ours/step_00000000/rank_00000.bin"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"params\.\S+: rank_00000.bin bytes"):
        convert(str(tmp_path / "ours"), str(tmp_path / "there"), Options(target="dcp"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]
    assert len(verify(open_checkpoint(tmp_path / "ours"))) == 1
    with pytest.raises(ValueError, match="exists already"):
        convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options())


def test_the_parts_of_a_leaf_are_told(tmp_path: Path) -> None:
    their_model("llama2").save_pretrained(tmp_path / "hf")
    for kind, end in (("megatree", " rank_00000.bin"), ("dcp", "")):
        convert(str(tmp_path / "hf"), str(tmp_path / kind), Options(target=kind, box_bytes=4000))
        held = {line.path: line.boxes for line in lines(open_checkpoint(tmp_path / kind))}
        assert held["params.head.norm"] == f"[0:24]{end}"
        assert held["params.embed.table"] == f"[0:41, 0:24]{end}, [41:82, 0:24]{end}, and 1 more"


def test_boxes_bound_what_is_read_at_once(tmp_path: Path) -> None:
    """Streaming: no chunk of the result is larger than a box, though leaves are."""
    their_model("llama2").save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), Options(box_bytes=1000))
    chunks = [
        c for leaf in read_manifest(tmp_path / "ours/step_00000000").leaves for c in leaf.chunks
    ]
    assert max(chunk.nbytes for chunk in chunks) <= 1000
    assert len(chunks) > 50
    shutil.rmtree(tmp_path / "ours")
