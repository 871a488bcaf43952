"""Rates are what the formulas say, by hand."""

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.runtime.meter import known_peak, meter

CPU = torch.device("cpu")
CFG = GPTConfig(
    vocab_size=32, seq_length=8, num_layers=2, embed=16, kv_heads=2, group=2, head_dim=4, ffn=24
)


def by_hand() -> int:
    """Return FLOPs of a token: 6 per weight of a product, and the causal half of attention."""
    heads = CFG.kv_heads * CFG.group * CFG.head_dim
    weights = CFG.embed * (2 * heads + 2 * CFG.kv_heads * CFG.head_dim + 3 * CFG.ffn)
    attention = 2 * 2 * heads * CFG.seq_length // 2
    return CFG.num_layers * (6 * weights + 3 * attention) + 6 * CFG.embed * CFG.vocab_size


@pytest.mark.parametrize("dp", [1, 2])
def test_rates_by_hand(dp: int) -> None:
    layout = Layout(Mesh(dp=dp), Rules(batch="dp")) if dp > 1 else Layout()
    found = meter(lower_model(gpt(CFG, batch_size=4), layout), CPU, 1e9)
    assert found.tokens == 4 * 8
    assert found.flops == found.tokens * by_hand()
    rates = found.rates(3, 0.5)
    assert rates["tokens_per_s"] == 3 * 32 / 0.5
    assert rates["model_flops_per_s"] == 3 * 32 * by_hand() / 0.5 / dp
    assert rates["mfu"] == pytest.approx(rates["model_flops_per_s"] / 1e9)


def test_a_cpu_has_no_peak_unless_it_is_given() -> None:
    found = meter(lower_model(gpt(CFG, batch_size=4), Layout()), CPU)
    assert found.rates(1, 1.0)["mfu"] is None
    assert known_peak(CPU) is None


def test_memory_counts_bytes() -> None:
    found = meter(lower_model(gpt(CFG, batch_size=4), Layout()), CPU)
    before = found.memory()
    assert before > 50 << 20, "torch alone is more than 50 MiB"
    held = torch.ones(before // 4 + (16 << 20))  # as much again and 64 MiB
    assert found.memory() >= before + (32 << 20)
    del held
