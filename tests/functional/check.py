"""Compare an op with an oracle: values and the gradients of all floating operands."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatree.functional import keys
from tests.tolerances import assert_leaves_close

Function = Callable[..., Any]


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return normal numbers that depend on shape and seed only, also under a function transform."""
    index = torch.arange(math.prod(shape)).reshape(shape)
    return keys.standard_normal(keys.fold(seed, *shape), index).to(dtype)


def values_and_grads(fn: Function, *operands: Any) -> dict[str, Tensor]:
    """Return outputs and the gradients of a fixed random combination of them."""
    leaves = [
        x.detach().clone().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in operands
    ]
    out = fn(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    total = torch.stack([(y * rand(*y.shape, dtype=y.dtype, seed=7)).sum() for y in outs]).sum()
    learned = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(total, learned)
    named = {f"value {i}": y.detach() for i, y in enumerate(outs)}
    return {**named, **{f"gradient {i}": g for i, g in enumerate(grads)}}


def assert_same(fn: Function, oracle: Function, *operands: Any) -> None:
    """Fail unless both give the same values and gradients, within the dtype's tolerance."""
    dtype = next(x.dtype for x in operands if isinstance(x, Tensor) and x.is_floating_point())
    got, expected = values_and_grads(fn, *operands), values_and_grads(oracle, *operands)
    assert [x.dtype for x in got.values()] == [x.dtype for x in expected.values()]
    assert_leaves_close(got, expected, dtype)
