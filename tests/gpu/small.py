"""The model and the batch of tests that ask how a step runs on a GPU, not what it computes."""

import torch
from torch import Tensor

from megatree.models.gpt import GPTConfig

BATCH = 4
CONFIG = GPTConfig(
    vocab_size=512,
    seq_length=128,
    num_layers=2,
    embed=128,
    kv_heads=2,
    group=2,
    head_dim=64,
    ffn=256,
    fused_loss=True,
)


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Return a whole microbatch of random tokens, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, CONFIG.vocab_size, (2, BATCH, 128), generator=draw)
    return {"tokens": tokens, "labels": labels, "weights": torch.ones(BATCH, 128)}


def on_gpu(seed: int = 0) -> dict[str, Tensor]:
    """Return the same on the GPU."""
    return {name: x.cuda() for name, x in batch(seed).items()}
