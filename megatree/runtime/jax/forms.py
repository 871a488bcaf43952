"""Every JAX form: one table per family of ops."""

from collections.abc import Callable, Mapping
from typing import Any

from megatree.runtime.jax import (
    ops_contraction,
    ops_factory,
    ops_pointwise,
    ops_reduction,
    ops_shape,
    ops_vocabulary,
)
from megatree.runtime.jax.form import Form

FORMS: Mapping[Callable[..., Any], Form] = {
    **ops_pointwise.TABLE,
    **ops_contraction.TABLE,
    **ops_reduction.TABLE,
    **ops_shape.TABLE,
    **ops_factory.TABLE,
    **ops_vocabulary.TABLE,
}
"""torch function, or the function under an op -> its form."""
