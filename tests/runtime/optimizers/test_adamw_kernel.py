"""The Triton kernel of AdamW in Triton's interpreter: torch's update, in one pass, copies too."""

import importlib
from types import ModuleType

import pytest
import torch

from tests.tolerances import distance

N = 37


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason="needs Triton's interpreter")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the kernel itself")
    module = importlib.import_module("megatree.runtime.optimizers.adamw_kernel")
    monkeypatch.setattr(module, "ELEMENTS", 16)
    return module


def test_ten_updates_are_those_of_torch_and_the_copy_is_rounded(kernel: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(N, generator=generator)
    theirs = param.clone().double().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    m, v = torch.zeros(N), torch.zeros(N)
    copy, scale = torch.zeros(N, dtype=torch.float16), torch.tensor(0.3)  # bfloat16 is cut off here
    for count in range(1, 11):
        grad = torch.randn(N, generator=generator).bfloat16()
        theirs.grad = grad.double() * 0.3
        optimizer.step()
        kernel.adamw_in_place(
            param, grad, m, v, copy=copy, scale=scale, found_inf=torch.zeros(()), lr=1e-2,
            betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, count=count,
        )  # fmt: skip
    assert distance(param, theirs.detach()) < 1e-6
    assert distance(v, optimizer.state[theirs]["exp_avg_sq"]) < 1e-6
    assert torch.equal(copy, param.half())


def test_an_overflow_leaves_every_bit(kernel: ModuleType) -> None:
    buffers = [torch.full((N,), float(i)) for i in range(5)]
    param, grad, m, v, copy = buffers
    grad.fill_(float("nan"))
    kernel.adamw_in_place(
        param, grad, m, v, copy=copy, scale=torch.ones(()), found_inf=torch.ones(()), lr=1e-2,
        betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, count=1,
    )  # fmt: skip
    assert [x.unique().tolist() for x in (param, m, v, copy)] == [[0.0], [2.0], [3.0], [4.0]]
