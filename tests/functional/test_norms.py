"""Norms against their formulas, on the fast path and off it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from tests.functional.check import assert_same, rand
from tests.tolerances import RELATIVE, distance


def rms(x: Tensor, w: Tensor | None = None) -> Tensor:
    y = x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + 1e-3) ** 0.5
    return y if w is None else y * w


def layer(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    y = rms(centred, w)
    return y if b is None else y + b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_equals_the_formula(
    shape: tuple[int, ...], weighted: bool, dtype: torch.dtype
) -> None:
    operands = [rand(*shape, dtype=dtype), *([rand(8, dtype=dtype)] if weighted else [])]
    assert_same(lambda *xs: F.rms_norm(*xs, eps=1e-3), rms, *operands)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_learned", [0, 1, 2])
def test_layer_norm_equals_the_formula(num_learned: int, dtype: torch.dtype) -> None:
    learned = [rand(8, dtype=dtype, seed=i) for i in range(num_learned)]
    assert_same(
        lambda *xs: F.layer_norm(*xs, eps=1e-3), layer, rand(2, 3, 8, dtype=dtype), *learned
    )


def test_second_derivative_of_rms_norm_is_that_of_the_formula() -> None:
    """A backward that used saved intermediates would lose a term here, and nowhere else."""
    x, w = rand(3, 8).requires_grad_(), rand(8).requires_grad_()
    assert type(F.rms_norm(x, w).grad_fn).__name__ == "_RmsNormBackward"
    assert torch.autograd.gradgradcheck(lambda x, w: F.rms_norm(x, w, eps=1e-3), (x, w))


def test_rms_norm_of_zero_has_a_finite_gradient() -> None:
    x, w = torch.zeros(2, 4, requires_grad=True), torch.ones(4)
    (grad,) = torch.autograd.grad(F.rms_norm(x, w, eps=1e-4).sum(), x)
    assert torch.equal(grad, torch.full((2, 4), 100.0))


@pytest.mark.parametrize("norm", [F.rms_norm, F.layer_norm])
def test_half_precision_norm_takes_its_mean_in_float32(norm: Callable[..., Tensor]) -> None:
    """The mean square of 4096 numbers near 100 has no bfloat16 sum: terms vanish beside it."""
    x = (rand(2, 4096) * 100).to(torch.bfloat16)
    w = torch.ones(4096, dtype=torch.bfloat16)
    got, expected = norm(x, w), norm(x.double(), w.double())
    assert got.dtype == torch.bfloat16
    assert distance(got, expected) < RELATIVE[torch.bfloat16] / 4
