"""On one GPU: the lowered step equals the CPU's, eager and compiled, in float32 and bfloat16."""

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout
from megatree.runtime.optimizers import adamw
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
    head_dim=32,
    ffn=256,
)


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 512, (2, 4, 128), generator=g)
    weights = (torch.rand(4, 128, generator=g) > 0.2).float()
    return {"tokens": tokens, "labels": labels, "weights": weights}


def losses(device: str, dtype: torch.dtype, *, compiled: bool = False, steps: int = 5):
    transform = torch.compile if compiled else lambda fn: fn
    step = train_step(
        gpt(CONFIG, batch_size=4, dtype=dtype),
        Layout(),
        adamw(1e-3),
        comm=OneDevice(device),
        transform=transform,
    )
    state = step.init(0)
    out = []
    for _ in range(steps):
        state, metrics = step(state, [step.local(batch())])
        out.append((metrics.loss.item(), metrics.grad_norm.item()))
    return torch.tensor(out, dtype=torch.float64)


# Under torch 2.11 dynamo itself reads .grad of what it wraps.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # off on purpose
@pytest.mark.parametrize("compiled", [False, True])
def test_float32_steps_equal_the_cpu(compiled: bool) -> None:
    """Losses and gradient norms of five updates: a wrong kernel or a host copy that races shows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = losses("cpu", torch.float32)
    got = losses("cuda", torch.float32, compiled=compiled)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=0)


def test_bfloat16_steps_follow_float32() -> None:
    expected = losses("cpu", torch.float32)
    got = losses("cuda", torch.bfloat16)
    torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=2e-2, atol=0)


def test_first_weights_are_bit_equal_on_both_devices() -> None:
    """Keyed numbers are integer arithmetic and table look-ups: no device may change a bit."""

    def weights(device: str):
        step = train_step(gpt(CONFIG, batch_size=4), Layout(), adamw(1e-3), comm=OneDevice(device))
        return {k: v.cpu() for k, v in step.init(7).params.items()}

    cpu, cuda = weights("cpu"), weights("cuda")
    assert cpu.keys() == cuda.keys()
    for name in cpu:
        assert torch.equal(cpu[name], cuda[name]), name
