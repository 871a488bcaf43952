"""JAX forms of torch reductions and of functions along a dim."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from megatree.runtime.jax.form import Form, dtype_of, table, wide

Dims = int | Sequence[int] | None


def _dims(dim: Dims) -> int | tuple[int, ...] | None:
    if dim is None or isinstance(dim, int):
        return dim
    return tuple(dim) or None  # torch reads () as all dims


def _reduction(fn: Callable[..., Array]) -> Form:
    """Return the form of a reduction; with a dtype it is done in that dtype."""

    def form(input: Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:  # noqa: A002
        x = input if dtype is None else input.astype(dtype_of(dtype))
        return fn(x, axis=_dims(dim), keepdims=keepdim)

    return form


def _extreme(value: Callable[..., Array], where: Callable[..., Array]) -> Form:
    """Return the form of max and min: the value, or along a dim a pair (values, indices)."""

    def form(input: Array, dim: int | None = None, keepdim: bool = False) -> Any:  # noqa: A002
        if dim is None:
            return value(input)
        indices = where(input, axis=dim, keepdims=True)
        values = jnp.take_along_axis(input, indices, axis=dim)
        if keepdim:
            return values, indices
        return jnp.squeeze(values, dim), jnp.squeeze(indices, dim)

    return form


def _position(fn: Callable[..., Array]) -> Form:
    return lambda input, dim=None, keepdim=False: fn(input, axis=dim, keepdims=keepdim)


def _along(fn: Callable[..., Array]) -> Form:
    """Return the form of a function along a dim, in another dtype if one is given."""

    def form(input: Array, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Array:  # noqa: A002
        return fn(input if dtype is None else input.astype(dtype_of(dtype)), axis=dim)

    return form


def _order(input: Array, dim: int, descending: bool, stable: bool) -> Array:  # noqa: A002
    return jnp.argsort(input, axis=dim, descending=descending, stable=stable)


def _sort(
    input: Array,  # noqa: A002
    dim: int = -1,
    descending: bool = False,
    stable: bool = False,
) -> tuple[Array, Array]:
    order = _order(input, dim, descending, stable)
    return jnp.take_along_axis(input, order, axis=dim), order


def _argsort(input: Array, dim: int = -1, descending: bool = False, stable: bool = False) -> Array:  # noqa: A002
    return _order(input, dim, descending, stable)


def _topk(
    input: Array,  # noqa: A002
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002
) -> tuple[Array, Array]:
    order = jax.lax.slice_in_dim(_order(input, dim, largest, True), 0, k, axis=dim)
    return jnp.take_along_axis(input, order, axis=dim), order


def _triangle(fn: Callable[..., Array]) -> Form:
    return lambda input, diagonal=0: fn(input, diagonal)


def _rms_norm(
    input: Array,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    eps: float | None = None,
) -> Array:
    dims = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    x = wide(input)
    eps = float(jnp.finfo(input.dtype).eps) if eps is None else eps
    unit = x * jax.lax.rsqrt(jnp.mean(x * x, axis=dims, keepdims=True) + eps)
    return unit if weight is None else unit * weight


def _layer_norm(
    input: Array,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    dims = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    x = wide(input)
    centred = x - jnp.mean(x, axis=dims, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=dims, keepdims=True) + eps)
    scaled = unit if weight is None else unit * weight
    return scaled if bias is None else scaled + bias


TABLE = table(
    {
        "tril": _triangle(jnp.tril),
        "triu": _triangle(jnp.triu),
        "sum": _reduction(jnp.sum),
        "mean": _reduction(jnp.mean),
        "prod": _reduction(jnp.prod),
        "amax": _reduction(jnp.max),
        "amin": _reduction(jnp.min),
        "all": _reduction(jnp.all),
        "any": _reduction(jnp.any),
        "logsumexp": _reduction(jax.nn.logsumexp),
        "count_nonzero": lambda input, dim=None: jnp.count_nonzero(input, axis=_dims(dim)),
        "max": _extreme(jnp.max, jnp.argmax),
        "min": _extreme(jnp.min, jnp.argmin),
        "argmax": _position(jnp.argmax),
        "argmin": _position(jnp.argmin),
        "softmax": _along(jax.nn.softmax),
        "log_softmax": _along(jax.nn.log_softmax),
        "cumsum": _along(jnp.cumsum),
        "cumprod": _along(jnp.cumprod),
        "logcumsumexp": _along(lambda x, axis: jax.lax.cumlogsumexp(x, axis % x.ndim)),
        "sort": _sort,
        "argsort": _argsort,
        "topk": _topk,
        "flip": lambda input, dims: jnp.flip(input, dims),
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
    }
)
