"""Logits of a checkpoint of any format, and small models as others keep them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatree.functional.tree import flatten_with_names
from megatree.io.checkpoint.box import whole
from megatree.models.decoder import decoder
from megatree.recipes.formats import Opened

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_MANY: dict[str, Any] = {**SIZES, "num_key_value_heads": 4}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 2, "beta_slow": 1,
    "mscale": 0.7, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
}  # fmt: skip
QWEN_MOE: dict[str, Any] = {
    **SIZES, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **_MANY, "moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 2,
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "rope_parameters": YARN,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama2": LlamaConfig(**_MANY),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=6, sliding_window=5),
    "qwen3 moe": Qwen3MoeConfig(**QWEN_MOE, norm_topk_prob=True),
    "qwen3 moe every 2": Qwen3MoeConfig(**QWEN_MOE, decoder_sparse_step=2),
    "deepseek": DeepseekV3Config(**DEEPSEEK),
    "deepseek direct": DeepseekV3Config(
        **DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": None},
        norm_topk_prob=False,
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_positions=64, n_embd=24, n_layer=3, n_head=4, bos_token_id=None,
        eos_token_id=None,
    ),
}  # fmt: skip


def their_model(name: str) -> Any:
    """Return a random model of a family, none of whose weights is trivial."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.eval()


def logits(opened: Opened, tokens: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the logits of our model with the weights of a checkpoint."""
    assert opened.model is not None
    batch, seq = tokens.shape
    model = decoder(opened.model, batch_size=batch, dtype=dtype).with_sizes(seq=seq, seq_res=seq)
    names, _, spec = flatten_with_names(model.params)
    values = [
        opened.reader.read(f"params.{name}", whole(opened.leaves[f"params.{name}"].shape)).to(dtype)
        for name in names
    ]
    batch_of = {"tokens": tokens, "labels": tokens, "weights": torch.ones(tokens.shape)}
    out, _ = model.for_evaluation().up_to("head").apply(spec.unflatten(values), batch_of)
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face folder, read by safetensors itself."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            out |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    return out
