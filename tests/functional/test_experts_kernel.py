"""The kernels of experts in Triton's interpreter, against the plain functions in float64."""

import importlib
from types import ModuleType

import pytest
import torch

import megatree.functional as F
from megatree.functional import dispatch
from tests.functional.check import rand
from tests.tolerances import distance

N, WIDTH, TOKENS, K = 11, 37, 5, 3


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason="needs Triton's interpreter")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the kernels themselves")
    module = importlib.import_module("megatree.functional.experts_kernel")
    monkeypatch.setattr(module, "COLUMNS", 16)  # several tiles, and a ragged one each way
    monkeypatch.setattr(module, "ROWS", 4)
    return module


@pytest.mark.parametrize("width", [1, 3, WIDTH])
def test_gated_swiglu_and_its_gradients(kernels: ModuleType, width: int) -> None:
    gate, up = (3 * rand(N, width, seed=i).float() for i in (0, 1))
    weight, grad = rand(N, 1, seed=2).float(), rand(N, width, seed=3).float()
    exact = [x.double().requires_grad_() for x in (gate, up, weight)]
    made = F.swiglu(exact[0], exact[1]) * exact[2]
    expected = torch.autograd.grad(made, exact, grad.double())
    assert distance(kernels.swiglu_forward(gate, up, weight), made.detach()) < 1e-6
    got = kernels.swiglu_backward(gate, up, weight, grad)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert distance(a, b) < 1e-6


@pytest.mark.parametrize("width", [1, 3, WIDTH])
def test_rows_go_there_and_come_back(kernels: ModuleType, width: int) -> None:
    """With choices that were dropped and slots that are empty: zeros there, nothing added here."""
    x, y = rand(TOKENS, width).float(), rand(N, width, seed=1).float()
    choices = TOKENS * K
    source = torch.tensor([4, 0, 14, 3, 15, 7, 7, 15, 1, 2, 9])
    place = torch.arange(choices).roll(3).clamp(max=N)
    assert len(source) == N
    assert (place == N).sum() == 4
    taken = kernels.take(x, source, K, choices)
    assert torch.equal(taken, dispatch._take(x, source, K))
    assert taken[4].count_nonzero() == 0
    assert distance(kernels.put(y, place, K), dispatch._put(y.double(), place, K)) < 1e-6
