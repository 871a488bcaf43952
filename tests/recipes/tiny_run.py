"""A run that takes a second: a tiny model on a text of its own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatree.models.gpt import GPTConfig
from megatree.recipes.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    megatron_rules,
)

SEQ = 16


def write_text(folder: Path) -> Path:
    """Write ten documents; return the file."""
    path = folder / "text.jsonl"
    texts = [f"Document {n}: " + "the cat sat on the mat. " * 20 for n in range(10)]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tiny_run(
    folder: Path, *, steps: int = 4, mesh: MeshConfig | None = None, **train: Any
) -> RunConfig:
    """Return a config whose data and checkpoints are in a folder."""
    mesh = mesh or MeshConfig()
    fields: Any = {"eval_every": 2, "eval_samples": 4, **train}
    return RunConfig(
        model=GPTConfig(
            vocab_size=512,
            seq_length=SEQ,
            num_layers=2,
            embed=16,
            kv_heads=2,
            head_dim=8,
            ffn=24,
        ),
        mesh=mesh,
        rules=megatron_rules(sequence_parallel=mesh.tp > 1),
        data=DataConfig(text=str(write_text(folder)), tokenizer="demo", split="80,20"),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
        train=replace(TrainConfig(steps=steps, global_batch=4, microbatch=2), **fields),
        checkpoint=CheckpointConfig(dir=str(folder / "run"), every=2),
    )


def with_group(cfg: RunConfig, group: str, **changes: Any) -> RunConfig:
    """Return a config with fields of a group replaced."""
    return replace(cfg, **{group: replace(getattr(cfg, group), **changes)})
