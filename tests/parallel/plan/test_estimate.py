"""Estimates against Megatron's published runs: nine sizes, one set of constants."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.plan import H100_SXM, estimate, plan
from megatree.parallel.schedule import interleaved

# heads, hidden, layers, tp, pp, dp, global batch, published MFU in % (H100, bf16, seq 4096)
PUBLISHED = {
    "1.7B": (16, 2048, 24, 1, 1, 48, 192, 41),
    "7.1B": (32, 4096, 30, 2, 1, 48, 192, 47),
    "16B": (48, 6144, 32, 4, 1, 48, 192, 49),
    "32B": (56, 7168, 48, 8, 1, 48, 192, 46),
    "70B": (64, 8192, 84, 8, 2, 48, 384, 42),
    "119B": (80, 10240, 92, 8, 4, 48, 768, 43),
    "177B": (96, 12288, 96, 8, 6, 48, 1152, 44),
    "314B": (128, 16384, 96, 8, 8, 48, 1536, 48),
    "462B": (144, 18432, 112, 8, 16, 48, 3072, 47),
}


def predicted(row: tuple[int, ...]) -> float:
    """Return the estimated MFU in %; chunks of at most three layers in a pipeline."""
    heads, hidden, layers, tp, pp, dp, batch, _ = row
    cfg = GPTConfig(
        vocab_size=131072, seq_length=4096, num_layers=layers, embed=hidden, kv_heads=heads,
        head_dim=hidden // heads, ffn=4 * hidden, norm="layer", activation="gelu",
    )  # fmt: skip
    per_rank = layers // pp
    chunk = max(n for n in (1, 2, 3) if per_rank % n == 0)
    schedule = partial(interleaved, num_virtual=per_rank // chunk) if pp > 1 else None
    layout = Layout(
        Mesh(pp=pp, dp=dp, tp=tp),
        Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp"),
        schedule=schedule,
    )
    made = plan(gpt(cfg, batch_size=dp, dtype=torch.bfloat16), layout, num_microbatches=batch // dp)
    return 100 * estimate(made).mfu


def test_published_runs_are_predicted_within_ten_percent_on_average() -> None:
    errors = {}
    for name, row in PUBLISHED.items():
        mfu = predicted(row)
        errors[name] = abs(mfu - row[-1]) / row[-1]
        line = (
            f"{name:>5}: predicted {mfu:.1f}%, published {row[-1]}%, off {mfu / row[-1] - 1:+.1%}"
        )
        print(line)  # noqa: T201
    assert sum(errors.values()) / len(errors) <= 0.10, errors
    assert max(errors.values()) <= 0.25, errors


def test_slower_links_cost_time_where_they_are_used() -> None:
    """A term that is not in the sum would not move."""
    cfg = GPTConfig(
        vocab_size=1024, seq_length=512, num_layers=4, embed=512, kv_heads=8, head_dim=64, ffn=2048
    )
    rules = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    made = plan(gpt(cfg, batch_size=16), Layout(Mesh(dp=16, tp=8), rules))
    base = estimate(made)
    slow_node = estimate(made, replace(H100_SXM, node_bandwidth=H100_SXM.node_bandwidth / 10))
    slow_net = estimate(made, replace(H100_SXM, network_bandwidth=H100_SXM.network_bandwidth / 10))
    assert slow_node.model_communication_s > base.model_communication_s
    assert slow_node.sync_s <= base.sync_s  # more compute time to hide it under
    assert slow_net.sync_s > base.sync_s
    assert slow_net.model_communication_s == pytest.approx(base.model_communication_s)
