"""Small buffers for every optimizer: two groups, drawn gradients, and ten steps of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatree.runtime.optimizers import GroupRule, Optimizer, State

SHAPES = {"matrices": (3, 24), "norms": (2, 5)}
GROUPS = {"matrices": GroupRule(), "norms": GroupRule(lr=0.5, decay=0.0)}

Buffers = dict[str, Tensor]


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> Buffers:
    """Return normal buffers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def copied(buffers: Mapping[str, Tensor]) -> Buffers:
    """Return copies."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


def steps(
    optimizer: Optimizer,
    *,
    num_steps: int = 10,
    dtype: torch.dtype = torch.float64,
    grad_dtype: torch.dtype | None = None,
    groups: Mapping[str, GroupRule] = GROUPS,
    scale: Tensor | float = 1.0,
    found_inf: Tensor | None = None,
    change: Callable[[Buffers], Buffers] = lambda grads: grads,
) -> tuple[Buffers, State]:
    """Return parameters and state after some steps with drawn gradients."""
    params = drawn(0, dtype)
    state = optimizer.init(params, groups)
    for step in range(num_steps):
        grads = change(drawn(step + 1, dtype if grad_dtype is None else grad_dtype))
        optimizer.update(
            params, grads, state, step=step, groups=groups, scale=scale, found_inf=found_inf
        )
    return params, state


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, the signs of zeros and NaNs included."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
