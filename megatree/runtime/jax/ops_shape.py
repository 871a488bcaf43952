"""JAX forms of torch functions that only move elements."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor

from megatree.runtime.jax.form import table, with_function


def _permuted(function: Callable[..., Any], input: Array, *args: Any, **kwargs: Any) -> Array:  # noqa: A002
    """Permute dims as the torch function does a tensor whose dim d has size d + 1."""
    numbered = torch.empty(*(d + 1 for d in range(input.ndim)), device="meta")
    return jnp.transpose(input, [n - 1 for n in function(numbered, *args, **kwargs).shape])


def _unsqueeze(input: Array, dim: int) -> Array:  # noqa: A002
    return jnp.expand_dims(input, dim)


def _cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.concatenate(tensors, axis=dim)


def _stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack(tensors, axis=dim)


def _split(function: Callable[..., Any], input: Array, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """Cut a dim where the torch function cuts one of a tensor of the same shape."""
    parts = function(torch.empty(input.shape, device="meta"), *args, **kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    starts, out = 0, []
    for part in parts:
        out.append(jax.lax.slice_in_dim(input, starts, starts + part.shape[dim], axis=dim))
        starts += part.shape[dim]
    return tuple(out)


def _unbind(input: Array, dim: int = 0) -> Any:  # noqa: A002
    return tuple(
        jax.lax.index_in_dim(input, i, axis=dim, keepdims=False) for i in range(input.shape[dim])
    )


def _narrow(input: Array, dim: int, start: int, length: int) -> Array:  # noqa: A002
    return jax.lax.slice_in_dim(input, start, start + length, axis=dim)


def _select(input: Array, dim: int, index: int) -> Array:  # noqa: A002
    return jax.lax.index_in_dim(input, index, axis=dim, keepdims=False)


def _gather(input: Array, dim: int, index: Array) -> Array:  # noqa: A002
    """Gather along a dim; along the others row i of the index reads row i of the value."""
    dim %= input.ndim
    rows = tuple(slice(None) if d == dim else slice(n) for d, n in enumerate(index.shape))
    return jnp.take_along_axis(input[rows], index, axis=dim)


def _take_along_dim(input: Array, indices: Array, dim: int) -> Array:  # noqa: A002
    return jnp.take_along_axis(input, indices, axis=dim)


TABLE = {
    **table(
        {
            "reshape": jnp.reshape,
            "unsqueeze": _unsqueeze,
            "squeeze": jnp.squeeze,
            "expand": jnp.broadcast_to,
            "cat concat concatenate": _cat,
            "stack": _stack,
            "unbind": _unbind,
            "narrow": _narrow,
            "select": _select,
            "getitem": lambda input, index: input[index],
            "gather": _gather,
            "take_along_dim": _take_along_dim,
        }
    ),
    **with_function(
        "transpose permute movedim moveaxis swapaxes swapdims t adjoint".split(), _permuted
    ),
    Tensor.T.__get__: partial(_permuted, Tensor.T.__get__),
    Tensor.mT.__get__: partial(_permuted, Tensor.mT.__get__),
    **with_function("chunk split tensor_split".split(), _split),
}
