"""What a JAX form is: a torch function's twin on JAX arrays, taking torch's own arguments."""

from collections.abc import Callable
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
    """Give each form to every torch function of its names ("sub rsub": torch.sub, Tensor.sub)."""
    return {
        function: form
        for names, form in forms.items()
        for name in names.split()
        for function in functions(name)
    }


def with_function(names: str, form: Callable[..., Any]) -> dict[Callable[..., Any], Form]:
    """Give a form that needs the torch function itself, as its first argument."""

    def bound(function: Callable[..., Any]) -> Form:
        return lambda *args, **kwargs: form(function, *args, **kwargs)

    return {f: bound(f) for name in names.split() for f in functions(name)}


def dtype_of(dtype: torch.dtype) -> Any:
    """Return JAX's dtype of a torch dtype, the 32-bit one where JAX has 64 bits switched off."""
    return jax.dtypes.canonicalize_dtype(jnp.dtype(str(dtype).removeprefix("torch.")))


def has_64_bits() -> bool:
    """Whether JAX has 64-bit numbers switched on."""
    return dtype_of(torch.int64).itemsize == 8


def wide(x: Array) -> Array:
    """Return the value in float32 or better."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
