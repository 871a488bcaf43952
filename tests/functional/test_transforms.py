"""Every op under torch.func: grad, vmap, forward mode, and their nests."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import megatree.functional as F
from megatree.functional.transforms import only_reverse, plain
from tests.functional.check import rand
from tests.tolerances import RELATIVE, distance

# torch's own decompositions for forward mode are still scripted (torch 2.13).
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)

IDS = torch.tensor([0, 3, 3, 1])
LABELS = torch.tensor([0, -100, 3, 1])
POSITIONS = torch.tensor([2, 0, 3, 1])
TABLE = F.rope_table(torch.arange(4), 4, dtype=torch.float64)
QKV = (rand(2, 4, 2, 2, 4), rand(2, 4, 2, 4, seed=1), rand(2, 4, 2, 4, seed=2))

# name -> (function of one tensor, that tensor); other operands are bound.
CASES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "einsum": (lambda x: F.einsum("b t g k, g k d -> b t d", x, rand(2, 3, 4)), rand(2, 3, 2, 3)),
    "einsum weight": (lambda w: F.einsum("t f, f d -> t d", rand(3, 5), w), rand(5, 4)),
    "linear": (lambda x: F.linear(x, rand(2, 3, 4)), rand(3, 4)),
    "linear weight": (lambda w: F.linear(rand(3, 4), w), rand(2, 3, 4)),
    "rms_norm": (lambda x: F.rms_norm(x, rand(4)), rand(3, 4)),
    "rms_norm weight": (lambda w: F.rms_norm(rand(3, 4), w), rand(4)),
    "layer_norm": (lambda x: F.layer_norm(x, rand(4), rand(4)), rand(3, 4)),
    "rope": (lambda x: F.rope(x, TABLE), rand(2, 4, 2, 6)),
    "attention q": (lambda q: F.attention(q, *QKV[1:]), QKV[0]),
    "attention k": (lambda k: F.attention(QKV[0], k, QKV[2]), QKV[1]),
    "attention v": (lambda v: F.attention(*QKV[:2], v), QKV[2]),
    "attention positions": (lambda q: F.attention(q, *QKV[1:], positions=POSITIONS), QKV[0]),
    "attention dropout": (lambda q: F.attention(q, *QKV[1:], key=3, dropout=0.5), QKV[0]),
    "silu": (F.silu, rand(7)),
    "gelu": (F.gelu, rand(7)),
    "gelu_tanh": (F.gelu_tanh, rand(7)),
    "squared_relu": (F.squared_relu, rand(7)),
    "swiglu": (lambda x: F.swiglu(x, rand(7, seed=1)), rand(7)),
    "embedding": (lambda table: F.embedding(IDS, table), rand(4, 3)),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS, num_classes=4), rand(4, 6)),
    "linear_cross_entropy": (
        lambda x: F.linear_cross_entropy(x, rand(6, 3), LABELS, rand(4, seed=2), num_classes=4),
        rand(4, 3),
    ),
    "dropout": (lambda x: F.dropout(x, torch.tensor(3), rate=0.5), rand(4, 5)),
    "softmax": (F.softmax, rand(3, 4)),
    "cumsum": (F.cumsum, rand(3, 4)),
    "mean": (partial(F.mean, dim=0), rand(3, 4)),
    "top_k": (lambda x: F.top_k(x, 2)[0], rand(3, 4)),
}


def scalar(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Combine the outputs with fixed weights, and not linearly: a second derivative is there."""
    y = fn(x)
    return (y.square() * rand(*y.shape, seed=9)).sum()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return CASES[request.param]


def test_grad_equals_autograd(case: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    fn, x = case
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(scalar(fn, leaf), leaf)
    assert distance(grad(partial(scalar, fn))(x), expected) < RELATIVE[torch.float64]


def test_vmap_equals_a_loop(case: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    fn, x = case
    xs = torch.stack([x, 2 * x.flip(0), x + 1])
    assert distance(vmap(fn)(xs), torch.stack([fn(x) for x in xs])) < RELATIVE[torch.float64]
    per_example = vmap(grad(partial(scalar, fn)))(xs)
    loop = torch.stack([grad(partial(scalar, fn))(x) for x in xs])
    assert distance(per_example, loop) < RELATIVE[torch.float64]


def test_forward_mode_equals_reverse_mode(case: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    fn, x = case
    tangent = rand(*x.shape, seed=11)
    along = jvp(partial(scalar, fn), (x,), (tangent,))[1]
    expected = (grad(partial(scalar, fn))(x) * tangent).sum()
    assert abs(along - expected) <= RELATIVE[torch.float64] * abs(expected)


def test_second_derivatives_are_symmetric(case: tuple[Callable[[Tensor], Tensor], Tensor]) -> None:
    """Forward over reverse, under vmap; along a line it is the derivative of the gradient."""
    fn, x = case
    second = hessian(partial(scalar, fn))(x).reshape(x.numel(), x.numel())
    assert distance(second, second.T) < RELATIVE[torch.float64]
    line, step = rand(*x.shape, seed=13), 1e-6
    up, down = (grad(partial(scalar, fn))(x + s * line) for s in (step, -step))
    expected = (up - down).flatten() / (2 * step)
    assert distance(second @ line.flatten(), expected) < 1e-7


def test_transforms_are_seen() -> None:
    seen: list[tuple[bool, bool]] = []

    def f(x: Tensor) -> Tensor:
        seen.append((only_reverse(x), plain(x)))
        return x.square().sum()

    x = rand(3)
    f(x)
    grad(f)(x)
    vmap(f)(x[None])
    jvp(f, (x,), (x,))
    grad(lambda x: grad(f)(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(x, x))
    assert seen == [(True, True), (True, False), *[(False, False)] * 4]
