"""What a JAX form is: a torch function's twin on JAX arrays, taking torch's own arguments."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array

from megatree.parallel.ops.rule import functions

Form = Callable[..., Any]
"""Called as the torch function is, with JAX arrays for tensors.

Its results are cast to the dtypes that the torch function's have, so a form need not promote as
torch does.
"""


def table(forms: dict[str, Form]) -> dict[Callable[..., Any], Form]:
    """Give each form to every torch function of its names ("add sub": torch.add, Tensor.sub, ...)."""
    return {
        function: form
        for names, form in forms.items()
        for name in names.split()
        for function in functions(name)
    }


def with_function(
    names: Iterable[str], form: Callable[..., Any]
) -> dict[Callable[..., Any], Form]:
    """Give a form that needs the torch function itself, as its first argument."""

    def bound(function: Callable[..., Any]) -> Form:
        return lambda *args, **kwargs: form(function, *args, **kwargs)

    return {f: bound(f) for name in names for f in functions(name)}


def dtype_of(dtype: torch.dtype) -> Any:
    """Return JAX's dtype of a torch dtype, the 32-bit one where JAX has 64 bits switched off."""
    return jax.dtypes.canonicalize_dtype(jnp.dtype(str(dtype).removeprefix("torch.")))


def wide(x: Array) -> Array:
    """Return the value in float32 or better."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
