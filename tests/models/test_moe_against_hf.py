"""The decoder with experts against Hugging Face with the same weights, and its files both ways."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatree.functional.chain import Chain
from megatree.functional.param import init
from megatree.functional.tree import flatten_with_names
from megatree.models.moe import moe
from megatree.models.moe_config import MoEConfig
from megatree.models.moe_names import (
    MIXTRAL,
    MIXTRAL_FILES,
    MIXTRAL_PARTS,
    QWEN3_MOE,
    QWEN3_MOE_PARTS,
    from_files,
    to_files,
)
from megatree.models.names import Source, from_foreign, to_foreign
from tests.tolerances import distance

VOCAB, SEQ, BATCH = 53, 8, 3
# In a float64 model they still compute norms, rotary angles and the router in float32.
AS_IT_IS = 1e-6


@dataclass(frozen=True)
class Case:
    sources: tuple[Source, ...]
    parts: tuple[str, str, str]
    renamed: dict[str, str]
    net: type[PreTrainedModel]
    config: type[Any]
    theirs: dict[str, Any]
    ours: dict[str, Any]

    def model(self) -> Chain:
        cfg = MoEConfig(
            vocab_size=VOCAB, seq_length=SEQ, num_layers=2, embed=24, kv_heads=2, group=2,
            head_dim=8, ffn=16, experts=6, top_k=2, expert_ffn=12, vocab_pad=8, init_std=0.2,
            **self.ours,
        )  # fmt: skip
        return moe(cfg, batch_size=BATCH, dtype=torch.float64)

    def hugging_face(self) -> PreTrainedModel:
        config = self.config(
            vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, rms_norm_eps=1e-5,
            max_position_embeddings=SEQ, use_cache=False, bos_token_id=None, eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **self.theirs,
        )  # fmt: skip
        net = self.net(config).double()
        net.set_attn_implementation("eager")
        net.set_experts_implementation("eager")
        return net


CASES = {
    "mixtral": Case(
        sources=MIXTRAL, parts=MIXTRAL_PARTS, renamed=MIXTRAL_FILES, net=MixtralForCausalLM,
        config=MixtralConfig, theirs={"num_local_experts": 6, "intermediate_size": 12}, ours={},
    ),
    "qwen3": Case(
        sources=QWEN3_MOE, parts=QWEN3_MOE_PARTS, renamed={}, net=Qwen3MoeForCausalLM,
        config=Qwen3MoeConfig,
        theirs={"num_experts": 6, "moe_intermediate_size": 12, "norm_topk_prob": True,
                "intermediate_size": 16},
        ours={"qk_norm": True},
    ),
    # weights of a token that do not add up to 1
    "qwen3 as chosen": Case(
        sources=QWEN3_MOE, parts=QWEN3_MOE_PARTS, renamed={}, net=Qwen3MoeForCausalLM,
        config=Qwen3MoeConfig,
        theirs={"num_experts": 6, "moe_intermediate_size": 12, "norm_topk_prob": False,
                "intermediate_size": 16},
        ours={"qk_norm": True, "pre_softmax": True},
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


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_hugging_face(name: str) -> None:
    case = CASES[name]
    model = case.model()
    params = weights(model)
    net = case.hugging_face()
    net.load_state_dict(to_foreign(case.sources, params, model))
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
    their_grads: dict[str, Tensor] = {
        name: leaf.grad for name, leaf in net.named_parameters() if leaf.grad is not None
    }
    names, expected, _ = flatten_with_names(from_foreign(case.sources, their_grads, model))
    got = [leaf.grad for leaf in optree.tree_leaves(leaves)]
    wrong = {
        path: error
        for path, a, b in zip(names, got, expected, strict=True)
        if not (error := distance(a, b)) < 2 * AS_IT_IS
    }
    assert not wrong


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    """Their file to our leaves and back to the same bits; their loader takes what we write."""
    case = CASES[name]
    model = case.model()
    net = case.hugging_face()
    net.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    held = load_file(file)
    params = from_foreign(case.sources, from_files(held, case.parts, case.renamed), model)
    state = net.state_dict()
    for key, value in to_foreign(case.sources, params, model).items():
        assert torch.equal(value, state[key]), key
    written = to_files(to_foreign(case.sources, params, model), case.parts, case.renamed)
    assert sorted(written) == sorted(held)
    assert all(torch.equal(written[key], held[key]) for key in held)
    save_file({k: v.contiguous() for k, v in written.items()}, file, metadata={"format": "pt"})
    again = case.net.from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_missing_expert_is_named() -> None:
    case = CASES["mixtral"]
    model = case.model()
    held = to_files(to_foreign(MIXTRAL, weights(model), model), case.parts, case.renamed)
    del held["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    with pytest.raises(
        ValueError,
        match=r"^model\.layers\.1\.mlp\.experts\.3\.w3\.weight: is missing, one of 1 of 6 exp",
    ):
        from_files(held, case.parts, case.renamed)
