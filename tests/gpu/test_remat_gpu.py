"""On one GPU: recomputation and offload give the same bits and hold less memory."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout
from megatree.parallel.plan import plan
from megatree.parallel.remat import Remat
from megatree.parallel.schedule import Schedule, zero_bubble_h1
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CONFIG = GPTConfig(
    vocab_size=512, seq_length=512, num_layers=8, embed=512, kv_heads=4, group=2, head_dim=64,
    ffn=1536, dropout=0.1,
)  # fmt: skip
POLICIES = {
    "full": Remat(policy="full"),
    "full, by three": Remat(policy="full", layers=3),
    "selective": Remat(policy="selective", ops=("attention", "norm", "activation", "rope")),
    "offload": Remat(offload=True),
    "full, offload": Remat(policy="full", offload=True),
    "selective, offload": Remat(policy="selective", offload=True),
}


def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    out = []
    for _ in range(3):
        tokens, labels = torch.randint(0, 512, (2, 8, 512), generator=g)
        out.append({"tokens": tokens, "labels": labels, "weights": torch.ones(8, 512)})
    return out


def split(_: int, m: int) -> Schedule:
    return zero_bubble_h1(1, m)


def ran(layout: Layout, *, compiled: bool = False) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Make two steps; return losses, the last gradients, and the most memory the last one took."""
    transform = partial(torch.compile, dynamic=False) if compiled else lambda fn: fn
    step = train_step(
        gpt(CONFIG, batch_size=8),
        layout,
        adamw(1e-3),
        comm=OneDevice("cuda"),
        transform=transform,
    )
    state, losses, most = step.init(0), [], 0
    local = [step.local(b) for b in batches()]
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state, metrics = step(state, local)
        losses.append(metrics.loss)
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - before
    stored = step.gradients.sums.stored
    return losses, {group.name: stored[group.name].clone() for group in step.groups}, most


@pytest.mark.parametrize("schedule", [None, split], ids=["1f1b", "zb-h1"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_bits_in_less_memory(policy: str, schedule: object) -> None:
    """A copy that is read before it arrived, or memory reused too early, changes a gradient."""
    layout = Layout(schedule=schedule)  # type: ignore[arg-type]
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        losses, grads, most = ran(layout)
        losses0, grads0, most0 = ran(replace(layout, remat=POLICIES[policy]))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert torch.equal(torch.stack(losses), torch.stack(losses0))
    for name, grad in grads.items():
        assert torch.equal(grad, grads0[name]), name
    made = plan(gpt(CONFIG, batch_size=8), replace(layout, remat=POLICIES[policy])).stages[0]
    planned = made.activation_bytes + made.again_bytes
    print(f"{policy}: {most0:,} of {most:,} bytes, planned {planned:,}")  # noqa: T201
    if schedule is None:
        assert most0 < 0.85 * most


@pytest.mark.filterwarnings("ignore")  # Dynamo's own: it reads .grad of what it wraps, say
@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_compiled_programs_recompute(policy: str) -> None:
    torch._dynamo.reset()
    losses, grads, _ = ran(Layout(), compiled=True)
    losses0, grads0, _ = ran(Layout(remat=POLICIES[policy]), compiled=True)
    torch.testing.assert_close(torch.stack(losses), torch.stack(losses0), rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert (grad - grads0[name]).norm() <= 1e-4 * grad.norm(), name
