"""SwiGLU of one product's halves: the op's values and gradients, by torch and by the kernels."""

import importlib

import pytest
import torch

import megatree.functional as F
from megatree.functional.activations import swiglu_halves
from tests.functional.check import rand
from tests.tolerances import distance

N, WIDTH = 5, 21


def test_halves_are_gates_and_ups() -> None:
    x = rand(2, 3, 2 * WIDTH).requires_grad_()
    gate, up = x.detach().chunk(2, -1)
    parts = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    theirs = F.swiglu(*parts)
    mine = swiglu_halves(x)
    assert torch.equal(mine, theirs)
    mine.sum().backward()
    theirs.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.cat([p.grad for p in parts if p.grad is not None], -1))


def test_kernels_in_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton's interpreter")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the kernels themselves")
    kernels = importlib.import_module("megatree.functional.swiglu_kernel")
    monkeypatch.setattr(kernels, "ROWS", 2)
    monkeypatch.setattr(kernels, "COLUMNS", 16)
    x, grad = (3 * rand(N, 2 * WIDTH)).float(), rand(N, WIDTH, seed=1).float()
    exact = x.double().requires_grad_()
    made = swiglu_halves(exact)
    (expected,) = torch.autograd.grad(made, exact, grad.double())
    assert distance(kernels.swiglu_forward(x), made.detach()) < 1e-6
    assert distance(kernels.swiglu_backward(x, grad), expected) < 1e-6
