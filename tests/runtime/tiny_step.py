"""A small model, its samples and its step, for tests of what happens around a step."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatree.io.data import Documents, GPTOptions, Stream, gpt_dataset
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import Layout
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import TrainStep, train_step

SEQ, BATCH = 8, 4


def tiny_step(
    layout: Layout, comm: RankComm | None = None, *, lr: float = 1e-2, dropout: float = 0.0
) -> TrainStep:
    """Return a step of two layers on microbatches of `BATCH` x `SEQ`."""
    cfg = GPTConfig(
        vocab_size=32,
        seq_length=SEQ,
        num_layers=2,
        embed=16,
        kv_heads=2,
        group=2,
        head_dim=4,
        ffn=24,
        dropout=dropout,
    )
    return train_step(gpt(cfg, batch_size=BATCH), layout, adamw(lr), comm=comm, seed=3)


def tiny_data(seed: int = 0) -> Stream:
    """Return 60 samples of a stream that repeats itself."""
    tokens = (np.arange(60 * SEQ + 1) * 7 % 31).astype(np.uint16)
    source = Documents(tokens=tokens, lengths=np.array([len(tokens)], np.int32))
    dataset = gpt_dataset(source, (0, 1), GPTOptions(seq=SEQ), num_samples=None)
    return Stream(dataset=dataset, seed=seed)


@dataclass
class Watched:
    """Samples that note what is read of them: (consumed, samples, rows)."""

    data: Stream
    reads: list[Any] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return self.data.identity

    def batch(self, consumed: int, num_samples: int, *, rows: Any = None) -> dict[str, Any]:
        self.reads.append((consumed, num_samples, rows))
        return self.data.batch(consumed, num_samples, rows=rows)
