"""Names and layouts of Hugging Face: nothing lost, nothing swapped, what is off refused."""

from typing import Any

import optree
import pytest
import torch

from megatree.functional.chain import Chain
from megatree.functional.param import init
from megatree.models.gpt import GPTConfig, gpt
from megatree.models.names import GPT2, LLAMA, Source, from_foreign, to_foreign

SIZES: dict[str, Any] = {
    "vocab_size": 10, "seq_length": 4, "num_layers": 2, "embed": 6, "head_dim": 2, "ffn": 5,
    "vocab_pad": 4,
}  # fmt: skip
LLAMA_MODEL = gpt(GPTConfig(kv_heads=2, group=3, **SIZES), batch_size=1)
TIED_MODEL = gpt(GPTConfig(kv_heads=2, tied=True, **SIZES), batch_size=1)
GPT2_MODEL = gpt(
    GPTConfig(
        kv_heads=3, norm="layer", positions="learned", activation="gelu_tanh", bias=True, **SIZES
    ),
    batch_size=1,
)


@pytest.mark.parametrize(
    ("sources", "model"), [(LLAMA, LLAMA_MODEL), (LLAMA, TIED_MODEL), (GPT2, GPT2_MODEL)]
)
def test_round_trip_is_bit_equal(sources: tuple[Source, ...], model: Chain) -> None:
    params = init(model.params, model.sizes, seed=1)
    foreign = to_foreign(sources, params, model)
    back = from_foreign(sources, foreign, model)
    assert optree.tree_all(optree.tree_map(torch.equal, params, back))
    assert sum(x.numel() for x in foreign.values()) == model.num_params


def test_layouts_are_theirs() -> None:
    params = init(LLAMA_MODEL.params, LLAMA_MODEL.sizes, seed=1)
    foreign = to_foreign(LLAMA, params, LLAMA_MODEL)
    dense = params["blocks"]["dense"]
    # Head 4 of 6 is kv head 1, second of its group.
    head = slice(4 * 2, 5 * 2)
    assert torch.equal(
        foreign["model.layers.1.self_attn.q_proj.weight"][head], dense["wq"][1, 1, 1]
    )
    assert torch.equal(
        foreign["model.layers.1.self_attn.o_proj.weight"][:, head].T, dense["wo"][1, 1, 1]
    )
    assert torch.equal(foreign["model.layers.0.mlp.down_proj.weight"].T, dense["w_down"][0])
    assert foreign["lm_head.weight"].shape == (10, 6), "padding is stripped"
    foreign = to_foreign(GPT2, init(GPT2_MODEL.params, GPT2_MODEL.sizes, seed=1), GPT2_MODEL)
    assert foreign["transformer.h.0.attn.c_attn.weight"].shape == (6, 18)
    assert foreign["transformer.h.1.attn.c_attn.bias"].shape == (18,)


def test_a_tied_head_may_be_in_the_file() -> None:
    params = init(TIED_MODEL.params, TIED_MODEL.sizes, seed=1)
    foreign = to_foreign(LLAMA, params, TIED_MODEL)
    assert "lm_head.weight" not in foreign
    foreign["lm_head.weight"] = foreign["model.embed_tokens.weight"]
    back = from_foreign(LLAMA, foreign, TIED_MODEL)
    assert torch.equal(back["embed"]["table"], params["embed"]["table"])


def test_missing_extra_and_misshaped_tensors_are_refused() -> None:
    foreign = to_foreign(LLAMA, init(LLAMA_MODEL.params, LLAMA_MODEL.sizes, seed=1), LLAMA_MODEL)
    name = "model.layers.1.self_attn.k_proj.weight"
    without = {k: v for k, v in foreign.items() if k != name}
    with pytest.raises(ValueError, match=f"1 tensors are missing: {name}. Give exactly"):
        from_foreign(LLAMA, without, LLAMA_MODEL)
    with pytest.raises(ValueError, match=r"1 tensors are left over: model\.layers\.2\.x\. Give"):
        from_foreign(LLAMA, {**foreign, "model.layers.2.x": torch.ones(1)}, LLAMA_MODEL)
    with pytest.raises(
        ValueError, match=r"k_proj.weight: shape is \[6, 4\], blocks.dense.wk needs \[4, 6\]\."
    ):
        from_foreign(LLAMA, {**foreign, name: foreign[name].T}, LLAMA_MODEL)
    with pytest.raises(ValueError, match=r"embed\.positions: the format has no name for it\. Use"):
        from_foreign(
            LLAMA, foreign, gpt(GPTConfig(kv_heads=2, positions="learned", **SIZES), batch_size=1)
        )
