"""Thin functions over torch: dims by keyword, and what they leave as it is."""

import torch

import megatree.functional as F
from tests.functional.check import assert_same, rand


def test_reductions_equal_plain_formulas() -> None:
    x = rand(3, 4, 5)
    exp = torch.exp(x)
    pairs = [
        (F.sum(x), sum(x.flatten().tolist())),
        (F.sum(x, dim=(0, 2)), x[0].sum(1) + x[1].sum(1) + x[2].sum(1)),
        (F.mean(x, dim=1, keepdim=True), (x[:, :1] + x[:, 1:2] + x[:, 2:3] + x[:, 3:]) / 4),
        (F.softmax(x), exp / exp.sum(-1, keepdim=True)),
        (F.log_softmax(x, dim=0), x - exp.sum(0).log()),
        (F.cumsum(x, dim=0), torch.stack([x[0], x[0] + x[1], x[0] + x[1] + x[2]])),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64))


def test_top_k_sorts_and_points_back() -> None:
    x = rand(4, 9)
    values, indices = F.top_k(x, 3)
    assert torch.equal(values, x.sort(descending=True).values[:, :3])
    assert torch.equal(x.gather(1, indices), values)


def test_stop_gradient_keeps_the_value_only() -> None:
    x = rand(3).requires_grad_()
    (grad,) = torch.autograd.grad((F.stop_gradient(x) * x).sum(), x)
    assert torch.equal(grad, x.detach())


def test_cast_returns_the_gradient_in_the_first_dtype() -> None:
    assert_same(lambda x: F.cast(x, torch.float32).double(), lambda x: x.float().double(), rand(5))
