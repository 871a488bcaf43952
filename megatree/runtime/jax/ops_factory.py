"""JAX forms of torch functions that make constants."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from megatree.runtime.jax.form import Form, table, with_function


def _arange(*bounds: Any, start: Any = 0, end: Any = None, step: Any = 1, **options: Any) -> Array:
    given = list(bounds) if end is None else [*(bounds or [start]), end]
    first, stop, by = {1: [start, *given, step], 2: [*given, step], 3: given}[len(given)]
    return jnp.arange(first, stop, by)


def _filled(value: Any) -> Form:
    def form(*size: Any, **options: Any) -> Array:
        return jnp.full(_shape(options.get("size", size)), value)

    return form


def _full(size: Sequence[int], fill_value: Any, **options: Any) -> Array:
    return jnp.full(_shape(size), fill_value)


def _shape(size: Sequence[Any]) -> tuple[int, ...]:
    """Return a shape given as numbers or as one sequence of them."""
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)


def _eye(n: int, m: int | None = None, **options: Any) -> Array:
    return jnp.eye(n, m)


def _constant(function: Callable[..., Any], *args: Any, **options: Any) -> Array:
    """Let torch make a small constant; lists, since numpy has no bfloat16."""
    return jnp.asarray(np.asarray(function(*args, **options, device="cpu").tolist()))


TABLE = {
    **table(
        {
            "arange": _arange,
            "zeros": _filled(0.0),
            "ones": _filled(1.0),
            "full": _full,
            "eye": _eye,
        }
    ),
    **with_function("linspace tensor scalar_tensor tril_indices", _constant),
}
