"""On one GPU: a call that the GPU has not passed is waited in; two deterministic runs are equal."""

import time

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import Axes, OneDevice, RankComm
from megatree.parallel.layout import Layout
from megatree.runtime.bits import hash_bits
from megatree.runtime.determinism import deterministic
from megatree.runtime.meter import known_peak
from megatree.runtime.optimizers import adamw
from megatree.runtime.recorded import RecordedComm, Recorder
from megatree.runtime.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CONFIG = GPTConfig(
    vocab_size=512,
    seq_length=128,
    num_layers=2,
    embed=128,
    kv_heads=2,
    group=2,
    head_dim=64,
    ffn=256,
)


class Slow(RankComm):
    """A mesh of one rank whose sum takes the GPU a while."""

    sizes, coords, device = {"dp": 1}, {"dp": 0}, torch.device("cuda")

    def psum(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        torch.cuda._sleep(1_000_000_000)  # clock cycles: half a second or more
        return x


def test_a_call_is_waited_in_until_the_gpu_has_passed_it() -> None:
    """The host goes on at once: what it is in says nothing."""
    recorder = Recorder("cuda")
    recorder.watched = True
    comm = RecordedComm(Slow(), recorder).at("model.py:3")
    x = torch.zeros(4, device="cuda")
    torch.cuda._sleep(1)  # the first launch of a kernel waits for the GPU
    comm.psum(x, ("dp",))
    time.sleep(0.1)
    waiting = recorder.waiting()
    assert waiting is not None
    assert str(waiting[0]) == "psum(dp) of float32 [4], call 1, forward, at model.py:3"
    assert waiting[1] > 0.05
    torch.cuda.synchronize()
    assert recorder.waiting() is None


def run(dtype: torch.dtype) -> tuple[list[int], list[float]]:
    """Return hashes of the parameters and the losses of a run."""
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 512, (2, 4, 128), generator=g)
    batch = {"tokens": tokens, "labels": labels, "weights": torch.ones(4, 128)}
    model = gpt(CONFIG, batch_size=4, dtype=dtype)
    step = train_step(model, Layout(), adamw(1e-3), comm=OneDevice("cuda"))
    state, losses = step.init(0), []
    for _ in range(20):
        state, metrics = step(state, [step.local(batch)])
        losses.append(metrics.loss.item())
    return [int(hash_bits(x)) for x in state.params.values()], losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_deterministic_runs_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    with deterministic(device="cuda"):
        assert run(dtype) == run(dtype)


def test_hashes_are_those_of_the_cpu() -> None:
    x = torch.randn(100_003)
    assert hash_bits(x.cuda()).cpu() == hash_bits(x)


def test_a_known_gpu_has_a_peak() -> None:
    name = torch.cuda.get_device_name()
    if any(part in name for part in ("H100", "H200")):
        assert known_peak(torch.device("cuda")) == 989e12
