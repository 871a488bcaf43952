"""On one GPU: within a step nothing makes the host wait for the device."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout
from megatree.parallel.precision import Precision
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.gpu.small import BATCH, CONFIG, on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch says so whenever the mode is set, as it knows of some calls that it cannot see.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


@contextmanager
def no_waiting() -> Generator[None]:
    """Make every call that waits for the device an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_mode_sees_a_wait() -> None:
    """What the tests below rely on: without it they could not fail."""
    flag = torch.ones((), device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        flag.item()


# Under torch 2.11 dynamo itself reads .grad of what it wraps.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("cfg", "num_microbatches", "compiled"),
    [
        (CONFIG, 1, False),
        (CONFIG, 1, True),
        (CONFIG, 2, False),
        (CONFIG, 2, True),
        (replace(CONFIG, fused_loss=False, dropout=0.1), 1, False),
    ],
    ids=["one", "one, compiled", "two", "two, compiled", "dropout, loss apart"],
)
def test_a_step_ahead_waits_for_nothing(
    cfg: GPTConfig, num_microbatches: int, compiled: bool
) -> None:
    """Forward, backward, norm, clipping and update; the first step compiles and allocates."""
    narrow = torch.bfloat16 if num_microbatches == 1 else None
    step = train_step(
        gpt(cfg, batch_size=BATCH, dtype=torch.bfloat16),
        Layout(),
        adamw(1e-3),
        comm=OneDevice("cuda"),
        max_norm=1.0,
        precision=Precision(grads=narrow),
        transform=partial(torch.compile, dynamic=False) if compiled else lambda fn: fn,
    )
    state, batches = step.init(0), [on_gpu()] * num_microbatches
    for _ in range(2):
        state, first = step(state, batches, ahead=True)
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(2):
            state, metrics = step(state, batches, ahead=True)
    assert state.step == 4
    assert metrics.loss.item() < first.loss.item()
