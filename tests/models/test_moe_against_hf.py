"""The decoder with experts against Hugging Face with the same weights: logits and gradients."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatree.functional.chain import Chain
from megatree.functional.param import init
from megatree.functional.tree import flatten_with_names
from megatree.models.decoder import decoder
from megatree.models.moe_config import MoEConfig
from megatree.models.moe_names import DEEPSEEK_V3, MIXTRAL, QWEN3_MOE
from megatree.models.names import Source, from_foreign, to_foreign
from tests.tolerances import distance

VOCAB, SEQ, BATCH = 53, 8, 3
# In a float64 model they still compute norms, rotary angles and the router in float32.
AS_IT_IS = 1e-6


@dataclass(frozen=True)
class Case:
    sources: tuple[Source, ...]
    net: type[PreTrainedModel]
    config: type[Any]
    theirs: dict[str, Any]
    ours: dict[str, Any]

    def model(self) -> Chain:
        usual: dict[str, Any] = {"kv_heads": 2, "group": 2, "head_dim": 8, "top_k": 2}
        cfg = MoEConfig(
            vocab_size=VOCAB, seq_length=SEQ, num_layers=2, embed=24, ffn=16, experts=6,
            expert_ffn=12, vocab_pad=8, init_std=0.2,
            **usual | self.ours,
        )  # fmt: skip
        return decoder(cfg, batch_size=BATCH, dtype=torch.float64)

    def hugging_face(self) -> PreTrainedModel:
        config = self.config(
            vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
            rms_norm_eps=1e-5, use_cache=False, bos_token_id=None,
            eos_token_id=None,
            **{"max_position_embeddings": SEQ, "num_key_value_heads": 2, "head_dim": 8,
               "num_experts_per_tok": 2,
               "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **self.theirs},
        )  # fmt: skip
        net = self.net(config).double()
        net.set_attn_implementation("eager")
        net.set_experts_implementation("eager")
        return net


CASES = {
    "mixtral": Case(
        sources=MIXTRAL, net=MixtralForCausalLM,
        config=MixtralConfig, theirs={"num_local_experts": 6, "intermediate_size": 12}, ours={},
    ),
    "qwen3": Case(
        sources=QWEN3_MOE, net=Qwen3MoeForCausalLM,
        config=Qwen3MoeConfig,
        theirs={"num_experts": 6, "moe_intermediate_size": 12, "norm_topk_prob": True,
                "intermediate_size": 16},
        ours={"qk_norm": True},
    ),
    # weights of a token that do not add up to 1
    "qwen3 as chosen": Case(
        sources=QWEN3_MOE, net=Qwen3MoeForCausalLM,
        config=Qwen3MoeConfig,
        theirs={"num_experts": 6, "moe_intermediate_size": 12, "norm_topk_prob": False,
                "intermediate_size": 16},
        ours={"qk_norm": True, "pre_softmax": True},
    ),
    "deepseek": Case(
        sources=DEEPSEEK_V3, net=DeepseekV3ForCausalLM, config=DeepseekV3Config,
        theirs={"num_key_value_heads": 4, "n_routed_experts": 6, "moe_intermediate_size": 12,
                "num_experts_per_tok": 4, "n_group": 3, "topk_group": 2, "intermediate_size": 16,
                "first_k_dense_replace": 1, "kv_lora_rank": 10, "q_lora_rank": 14,
                "qk_rope_head_dim": 4, "head_dim": 4, "max_position_embeddings": 64,
                "qk_nope_head_dim": 6, "v_head_dim": 5,
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 2,
                    "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 16}},
        ours={"kv_heads": 4, "group": 1, "head_dim": 6, "top_k": 4, "score": "sigmoid",
              "groups": 3, "group_top_k": 2, "route_scale": 2.5, "shared_ffn": 12,
              "dense_first": 1, "bias_rate": 0.0, "kv_rank": 10, "q_rank": 14, "rope_dim": 4,
              "value_dim": 5, "rope_base": 100.0, "yarn": (4.0, 2.0, 1.0, 16.0, 0.7, 1.0)},
    ),
}  # fmt: skip


def weights(model: Chain) -> Any:
    """Return first values, moved so that no norm is all ones and no two experts are alike."""
    params = init(model.params, model.sizes, seed=5, dtype=torch.float64)
    moved: Any = optree.tree_map(
        lambda x: x + 0.1 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape),
        params,
    )
    for name in ("embed", "head"):
        moved[name]["table"][VOCAB:] = 0
    return moved


_APART = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the experts of a layer, as their modules hold them and their files do not."""
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, int], Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        here = name.replace("block_sparse_moe", "mlp")
        if found := _APART.fullmatch(here):
            experts[found[1]][int(found[2]), _PARTS[found[3]]] = value
        else:
            out[here] = value
    for place, held in experts.items():
        count = len(held) // 3
        gate, up, down = (torch.stack([held[e, p] for e in range(count)]) for p in range(3))
        out[f"{place}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        out[f"{place}.experts.down_proj"] = down
    return out


def as_in_files(tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what `in_memory` was given, by the names of it."""
    out: dict[str, Tensor] = {}
    for name in names:
        here = name.replace("block_sparse_moe", "mlp")
        if not (found := _APART.fullmatch(here)):
            out[name] = tensors[here]
            continue
        part, expert = _PARTS[found[3]], int(found[2])
        if part == 2:
            out[name] = tensors[f"{found[1]}.experts.down_proj"][expert]
        else:
            out[name] = tensors[f"{found[1]}.experts.gate_up_proj"][expert].chunk(2)[part]
    return out


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_hugging_face(name: str) -> None:
    case = CASES[name]
    model = case.model()
    params = weights(model)
    net = case.hugging_face()
    foreign = to_foreign(case.sources, params, model)
    net.load_state_dict(in_memory(foreign))
    draw = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCAB, (2, BATCH, SEQ), generator=draw)
    logits = net(input_ids=tokens).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    ).backward()
    batch = {"tokens": tokens, "labels": labels, "weights": torch.ones(BATCH, SEQ)}
    leaves = optree.tree_map(lambda x: x.clone().requires_grad_(), params)
    ours, _ = model.up_to("head").apply(leaves, batch)
    assert distance(ours[..., :VOCAB], logits) < AS_IT_IS
    model.apply(leaves, batch)[1]["loss"]["terms"]["loss"][0].backward()
    held = dict(net.named_parameters())
    held |= {key: x for key, x in net.named_buffers() if key.endswith("e_score_correction_bias")}
    their_grads = {
        key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in held.items()
    }
    found = as_in_files(their_grads, foreign)
    names, expected, _ = flatten_with_names(from_foreign(case.sources, found, model))
    wrong = {
        path: error
        for path, leaf, b in zip(names, optree.tree_leaves(leaves), expected, strict=True)
        if not (error := distance(torch.zeros_like(b) if leaf.grad is None else leaf.grad, b))
        < 2 * AS_IT_IS
    }
    assert not wrong


def test_a_missing_expert_is_named() -> None:
    model = CASES["mixtral"].model()
    held = to_foreign(MIXTRAL, weights(model), model)
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    del held[name]
    with pytest.raises(ValueError, match=rf"^1 tensors are missing: {re.escape(name)}\."):
        from_foreign(MIXTRAL, held, model)
