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

    def form(x: Array, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
        x = x if dtype is None else x.astype(dtype_of(dtype))
        return fn(x, axis=_dims(dim), keepdims=keepdim)

    return form


def _extreme(value: Callable[..., Array], where: Callable[..., Array]) -> Form:
    """Return the form of max and min: the value, or along a dim a pair (values, indices)."""

    def form(x: Array, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            return value(x)
        indices = where(x, axis=dim, keepdims=True)
        values = jnp.take_along_axis(x, indices, axis=dim)
        if keepdim:
            return values, indices
        return jnp.squeeze(values, dim), jnp.squeeze(indices, dim)

    return form


def _position(fn: Callable[..., Array]) -> Form:
    return lambda x, dim=None, keepdim=False: fn(x, axis=dim, keepdims=keepdim)


def _along(fn: Callable[..., Array]) -> Form:
    """Return the form of a function along a dim, in another dtype if one is given."""

    def form(x: Array, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Array:
        return fn(x if dtype is None else x.astype(dtype_of(dtype)), axis=dim)

    return form


def _order(x: Array, dim: int, descending: bool, stable: bool) -> Array:
    return jnp.argsort(x, axis=dim, descending=descending, stable=stable)


def _sort(
    x: Array,
    dim: int = -1,
    descending: bool = False,
    stable: bool = False,
) -> tuple[Array, Array]:
    order = _order(x, dim, descending, stable)
    return jnp.take_along_axis(x, order, axis=dim), order


def _argsort(x: Array, dim: int = -1, descending: bool = False, stable: bool = False) -> Array:
    return _order(x, dim, descending, stable)


def _topk(
    x: Array,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002
) -> tuple[Array, Array]:
    order = jax.lax.slice_in_dim(_order(x, dim, largest, True), 0, k, axis=dim)
    return jnp.take_along_axis(x, order, axis=dim), order


def _triangle(fn: Callable[..., Array]) -> Form:
    return lambda x, diagonal=0: fn(x, diagonal)


def _rms_norm(
    x: Array,
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    eps: float | None = None,
) -> Array:
    dims = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    x = wide(x)
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    unit = x * jax.lax.rsqrt(jnp.mean(x * x, axis=dims, keepdims=True) + eps)
    return unit if weight is None else unit * weight


def _layer_norm(
    x: Array,
    normalized_shape: Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    dims = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    x = wide(x)
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
        "count_nonzero": lambda x, dim=None: jnp.count_nonzero(x, axis=_dims(dim)),
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
        "flip": lambda x, dims: jnp.flip(x, dims),
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
    }
)
