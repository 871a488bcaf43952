"""Logits of a checkpoint of any format, and small models as others keep them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from megatree.functional.tree import flatten_with_names
from megatree.io.checkpoint.box import whole
from megatree.models.gpt import gpt
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
CONFIGS: dict[str, PretrainedConfig] = {
    "llama2": LlamaConfig(**_MANY),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
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
    return model.eval()


def logits(opened: Opened, tokens: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the logits of our model with the weights of a checkpoint."""
    assert opened.model is not None
    batch, seq = tokens.shape
    model = gpt(opened.model, batch_size=batch, dtype=dtype).with_sizes(seq=seq, seq_res=seq)
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
