"""AdamW, SGD and Lion make the updates of torch.optim, or of their papers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.runtime.optimizers import Optimizer, adamw, lion, sgd
from tests.runtime.optimizers.buffers import GROUPS, drawn, steps
from tests.tolerances import assert_leaves_close


def of_torch(cls: type[torch.optim.Optimizer], lr: float, decay: float, **options: Any) -> Any:
    """Return the parameters after ten steps of an optimizer of torch."""
    params = {name: torch.nn.Parameter(p) for name, p in drawn(0).items()}
    groups = [
        {
            "params": [params[name]],
            "lr": lr * rule.lr,
            "weight_decay": decay * rule.decay,
        }
        for name, rule in GROUPS.items()
    ]
    optimizer = cls(groups, **options)
    for step in range(10):
        for name, grad in drawn(step + 1).items():
            params[name].grad = grad
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_adamw_is_that_of_torch(betas: tuple[float, float]) -> None:
    expected = of_torch(torch.optim.AdamW, 1e-2, 0.1, betas=betas, eps=1e-6)
    params, state = steps(adamw(1e-2, betas=betas, eps=1e-6, weight_decay=0.1))
    assert_leaves_close(params, expected)
    assert list(state) == ["m", "v"]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_that_of_torch(momentum: float, nesterov: bool) -> None:
    expected = of_torch(torch.optim.SGD, 1e-2, 0.1, momentum=momentum, nesterov=nesterov)
    params, state = steps(sgd(1e-2, momentum=momentum, nesterov=nesterov, weight_decay=0.1))
    assert_leaves_close(params, expected)
    assert list(state) == (["momentum"] if momentum else [])


def lion_reference(p: Tensor, lr: float, decay: float, grads: list[Tensor]) -> Tensor:
    """Return a parameter after Lion's algorithm as published, in float64."""
    m = torch.zeros_like(p)
    for g in grads:
        c = 0.9 * m + (1 - 0.9) * g
        p = p - lr * (torch.sign(c) + decay * p)
        m = 0.99 * m + (1 - 0.99) * g
    return p


def test_lion_is_the_published_algorithm() -> None:
    grads = [drawn(step + 1) for step in range(10)]
    expected = {
        name: lion_reference(
            p, 1e-2 * GROUPS[name].lr, 0.3 * GROUPS[name].decay, [g[name] for g in grads]
        )
        for name, p in drawn(0).items()
    }
    params, _ = steps(lion(1e-2, weight_decay=0.3))
    assert_leaves_close(params, expected)


@pytest.mark.parametrize(
    "make", [adamw, sgd, lion], ids=lambda make: getattr(make, "__name__", None)
)
def test_schedules_of_learning_rate_and_decay_are_those_of_the_step(make: Any) -> None:
    """A step off by one would shift the whole schedule, which no loss curve shows."""

    def at(step: int) -> Optimizer:
        return make(0.01 * (step + 1), weight_decay=0.1 * step)

    params = drawn(0)
    state = at(0).init(params)
    for step in range(3):
        at(step).update(params, drawn(step + 1), state, step=step, groups=GROUPS)
    scheduled = make(lambda step: 0.01 * (step + 1), weight_decay=lambda step: 0.1 * step)
    got, _ = steps(scheduled, num_steps=3)
    for name, expected in params.items():
        assert torch.equal(got[name], expected)
