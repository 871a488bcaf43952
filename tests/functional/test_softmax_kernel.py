"""The Triton kernels of a softmax in Triton's interpreter, against torch in float64."""

import importlib
from types import ModuleType

import pytest
import torch

from tests.functional.check import rand
from tests.tolerances import distance

ROWS, WIDTH, CLASSES = 5, 37, 33


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason="needs Triton's interpreter")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the kernels themselves")
    module = importlib.import_module("megatree.functional.softmax_kernel")
    monkeypatch.setattr(module, "COLUMNS", 16)  # several steps along a row
    return module


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.tensor([0, 20, 32, -100, 19])
    factors = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.25])
    return (3 * rand(ROWS, WIDTH)).to(dtype), labels, factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_row(kernels: ModuleType, dtype: torch.dtype) -> None:
    logits, labels, factors = drawn(dtype)
    exact = logits[:, :CLASSES].double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (slope,) = torch.autograd.grad((nll * factors).sum(), exact)
    top, total, own = kernels.statistics(logits, labels, start=0, num_real=CLASSES)
    found = (total.log() + top - own).masked_fill(labels == -100, 0.0)
    assert distance(found, nll.detach()) < 1e-6
    kernels.gradient_in_place(logits, labels, top, total, factors, start=0, num_real=CLASSES)
    assert distance(logits[:, :CLASSES], slope) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert logits[:, CLASSES:].count_nonzero() == 0


def test_two_halves_of_a_row_merge(kernels: ModuleType) -> None:
    logits, labels, factors = drawn(torch.float32)
    halves = [logits[:, :20].contiguous(), logits[:, 20:].contiguous()]
    places = [{"start": 0, "num_real": 20}, {"start": 20, "num_real": CLASSES - 20}]
    parts = [kernels.statistics(z, labels, **at) for z, at in zip(halves, places, strict=True)]
    top = torch.maximum(parts[0][0], parts[1][0])
    total = torch.stack([total * (mine - top).exp() for mine, total, _ in parts]).sum(0)
    whole = kernels.statistics(logits, labels, start=0, num_real=CLASSES)
    assert torch.equal(top, whole[0])
    assert distance(total, whole[1]) < 1e-6
    assert torch.equal(torch.maximum(parts[0][2], parts[1][2]), whole[2])
    for z, at in zip(halves, places, strict=True):
        kernels.gradient_in_place(z, labels, top, total, factors, **at)
    kernels.gradient_in_place(
        logits, labels, whole[0], whole[1], factors, start=0, num_real=CLASSES
    )
    assert distance(torch.cat(halves, 1), logits) < 1e-6
