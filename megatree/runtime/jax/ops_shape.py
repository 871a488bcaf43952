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


def _permuted(function: Callable[..., Any], x: Array, *args: Any, **kwargs: Any) -> Array:
    """Permute dims as the torch function does a tensor whose dim d has size d + 1."""
    numbered = torch.empty(*(d + 1 for d in range(x.ndim)), device="meta")
    return jnp.transpose(x, [n - 1 for n in function(numbered, *args, **kwargs).shape])


def _unsqueeze(x: Array, dim: int) -> Array:
    return jnp.expand_dims(x, dim)


def _cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.concatenate(tensors, axis=dim)


def _stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack(tensors, axis=dim)


def _split(function: Callable[..., Any], x: Array, *args: Any, **kwargs: Any) -> Any:
    """Cut a dim where the torch function cuts one of a tensor of the same shape."""
    parts = function(torch.empty(x.shape, device="meta"), *args, **kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    starts, out = 0, []
    for part in parts:
        out.append(jax.lax.slice_in_dim(x, starts, starts + part.shape[dim], axis=dim))
        starts += part.shape[dim]
    return tuple(out)


def _unbind(x: Array, dim: int = 0) -> Any:
    return tuple(jax.lax.index_in_dim(x, i, axis=dim, keepdims=False) for i in range(x.shape[dim]))


def _narrow(x: Array, dim: int, start: int, length: int) -> Array:
    return jax.lax.slice_in_dim(x, start, start + length, axis=dim)


def _select(x: Array, dim: int, index: int) -> Array:
    return jax.lax.index_in_dim(x, index, axis=dim, keepdims=False)


def _gather(x: Array, dim: int, index: Array) -> Array:
    """Gather along a dim; along the others row i of the index reads row i of the value."""
    dim %= x.ndim
    rows = tuple(slice(None) if d == dim else slice(n) for d, n in enumerate(index.shape))
    return jnp.take_along_axis(x[rows], index, axis=dim)


def _take_along_dim(x: Array, indices: Array, dim: int) -> Array:
    return jnp.take_along_axis(x, indices, axis=dim)


_TRANSPOSED: Any = (Tensor.T, Tensor.mT)
_GETTERS = [attribute.__get__ for attribute in _TRANSPOSED]

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
            "getitem": lambda x, index: x[index],
            "gather": _gather,
            "take_along_dim": _take_along_dim,
        }
    ),
    **with_function("transpose permute movedim moveaxis swapaxes swapdims t adjoint", _permuted),
    **{getter: partial(_permuted, getter) for getter in _GETTERS},
    **with_function("chunk split tensor_split", _split),
}
