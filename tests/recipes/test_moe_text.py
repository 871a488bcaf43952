"""Text of a model with experts against Hugging Face's, through a run's checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from megatree.models.moe_names import MIXTRAL
from megatree.models.names import to_foreign
from megatree.recipes.config import MeshConfig
from megatree.recipes.job import open_job
from megatree.recipes.sample import Sampling, sample
from megatree.recipes.vocabulary import load_tokenizer
from tests.recipes.test_moe_run import CPU, MODEL, PROMPTS, moe_run, silent
from tests.recipes.tiny_run import SEQ


def test_text_is_what_hugging_face_makes_greedily(tmp_path: Path) -> None:
    """Through the checkpoint, padded rows and all; a capacity drops nothing here."""
    model = replace(MODEL, capacity_factor=0.5, pad_to_capacity=True)
    cfg = moe_run(tmp_path, model=model, steps=1)
    job = open_job(CPU, cfg, silent).train()
    params = job.step.params(job.progress.state)
    config = MixtralConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, rms_norm_eps=1e-5,
        max_position_embeddings=SEQ, num_local_experts=4, intermediate_size=16,
        bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config.save_pretrained(tmp_path / "hf")
    tensors = to_foreign(MIXTRAL, params, job.step.program.model)
    held = {name: x.detach().contiguous() for name, x in tensors.items()}
    save_file(held, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    net = MixtralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = load_tokenizer(cfg.data)
    texts = sample(CPU, cfg.checkpoint.dir, MeshConfig(), PROMPTS, Sampling(max_tokens=8))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer.encode(prompt) or [tokenizer.special.need("eod")]
        row = torch.tensor([ids])
        out: Tensor = net.generate(  # type: ignore[assignment]
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=8
        )
        whole = tokenizer.decode(out[0].tolist())
        assert text == whole[len(tokenizer.decode(ids)) :]
        assert text
