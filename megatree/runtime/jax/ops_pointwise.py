"""JAX forms of pointwise torch functions."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy import special

from megatree.runtime.jax.form import Form, table


def _add(x: Any, other: Any, *, alpha: float = 1) -> Any:
    return x + (other if alpha == 1 else alpha * other)


def _sub(x: Any, other: Any, *, alpha: float = 1) -> Any:
    return x - (other if alpha == 1 else alpha * other)


def _divide(x: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return x / other
    return jnp.floor(x / other) if rounding_mode == "floor" else jnp.trunc(x / other)


def _clamp(x: Array, min: Any = None, max: Any = None) -> Array:  # noqa: A002
    # Not jnp.clip, whose gradient at a bound is a half.
    if min is not None:
        x = jnp.where(x < min, min, x)
    return x if max is None else jnp.where(x > max, max, x)


def _softplus(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    scaled = x * beta
    linear = scaled > threshold  # torch's own shortcut, off by 2e-9 where it starts
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, 0, scaled))) / beta)


def _gelu(x: Array, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _leaky_relu(x: Array, negative_slope: float = 0.01, inplace: bool = False) -> Array:
    return jnp.where(x > 0, x, x * negative_slope)


def _hardtanh(
    x: Array,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Array:
    return _clamp(x, min_val, max_val)


def _logit(x: Array, eps: float | None = None) -> Array:
    x = x if eps is None else _clamp(x, eps, 1 - eps)
    return jnp.log(x / (1 - x))


def _where(condition: Array, input: Any, other: Any) -> Array:  # noqa: A002
    return jnp.where(condition, input, other)


def _masked_fill(x: Array, mask: Array, value: Any) -> Array:
    return jnp.where(mask, value, x)


def _same(x: Array, *args: Any, **options: Any) -> Array:
    """Return the value; a cast is in the dtype that every result is given."""
    return x


def _filled(value: Any) -> Form:
    return lambda x, **options: _full_like(x, value)


def _full_like(x: Array, fill_value: Any, **options: Any) -> Array:
    return jnp.full_like(x, fill_value, dtype=jnp.result_type(fill_value))


def _binary(fn: Callable[..., Any]) -> Form:
    """Return the form of a function of two operands, the second of which torch calls `other`."""
    return lambda x, other: fn(x, other)


def _swapped(form: Form) -> Form:
    """Return the form of a reflected operator."""
    return lambda x, other: form(other, x)


def _elu(x: Array, alpha: float = 1.0, inplace: bool = False) -> Array:
    return jax.nn.elu(x, alpha)


def _activation(form: Form) -> Form:
    return lambda x, inplace=False: form(x)


TABLE = table(
    {
        "abs": jnp.abs,
        "acos": jnp.arccos,
        "asin": jnp.arcsin,
        "atan": jnp.arctan,
        "atan2": _binary(jnp.arctan2),
        "ceil": jnp.ceil,
        "clamp": _clamp,
        "clamp_min": lambda x, min: _clamp(x, min),  # noqa: A006
        "clamp_max": lambda x, max: _clamp(x, None, max),  # noqa: A006
        "cos": jnp.cos,
        "cosh": jnp.cosh,
        "elu": _elu,
        "eq": _binary(operator.eq),
        "erf": special.erf,
        "erfc": special.erfc,
        "exp": jnp.exp,
        "exp2": jnp.exp2,
        "expm1": jnp.expm1,
        "floor": jnp.floor,
        "floor_divide floordiv": _binary(jnp.floor_divide),
        "fmod": _binary(jnp.fmod),
        "ge": _binary(operator.ge),
        "gelu": _gelu,
        "gt": _binary(operator.gt),
        "hardtanh": _hardtanh,
        "heaviside": lambda x, values: jnp.heaviside(x, values),
        "isfinite": jnp.isfinite,
        "isinf": jnp.isinf,
        "isnan": jnp.isnan,
        "isneginf": jnp.isneginf,
        "isposinf": jnp.isposinf,
        "le": _binary(operator.le),
        "leaky_relu": _leaky_relu,
        "log": jnp.log,
        "log10": jnp.log10,
        "log1p": jnp.log1p,
        "log2": jnp.log2,
        "logaddexp": _binary(jnp.logaddexp),
        "logical_and": _binary(jnp.logical_and),
        "logical_not": jnp.logical_not,
        "logical_or": _binary(jnp.logical_or),
        "logical_xor": _binary(jnp.logical_xor),
        "logit": _logit,
        "logsigmoid": jax.nn.log_sigmoid,
        "lt": _binary(operator.lt),
        "maximum": _binary(jnp.maximum),
        "minimum": _binary(jnp.minimum),
        "mod remainder": _binary(jnp.remainder),
        "nan_to_num": jnp.nan_to_num,
        "ne": _binary(operator.ne),
        "pow": lambda x, exponent: operator.pow(x, exponent),
        "reciprocal": jnp.reciprocal,
        "relu": _activation(jax.nn.relu),
        "relu6": _activation(jax.nn.relu6),
        "round": lambda x, *, decimals=0: jnp.round(x, decimals),
        "rsqrt": jax.lax.rsqrt,
        "selu": _activation(jax.nn.selu),
        "sigmoid": jax.nn.sigmoid,
        "sign": jnp.sign,
        "silu": _activation(jax.nn.silu),
        "sin": jnp.sin,
        "sinh": jnp.sinh,
        "softplus": _softplus,
        "sqrt": jnp.sqrt,
        "square": jnp.square,
        "tan": jnp.tan,
        "tanh": jnp.tanh,
        "trunc": jnp.trunc,
        "xlogy": _binary(special.xlogy),
        "bitwise_and and": _binary(operator.and_),
        "bitwise_or or": _binary(operator.or_),
        "bitwise_xor xor": _binary(operator.xor),
        "bitwise_not invert": operator.invert,
        "bitwise_left_shift lshift": _binary(operator.lshift),
        "bitwise_right_shift rshift": _binary(operator.rshift),
        "rand": _swapped(operator.and_),
        "ror": _swapped(operator.or_),
        "rxor": _swapped(operator.xor),
        "rlshift": _swapped(operator.lshift),
        "rrshift": _swapped(operator.rshift),
        "rpow": _swapped(operator.pow),
        "rmod": _swapped(jnp.remainder),
        "rfloordiv": _swapped(jnp.floor_divide),
        "rdiv rtruediv": _swapped(operator.truediv),
        "neg negative": operator.neg,
        "positive pos contiguous clone real": _same,
        "to": _same,
        "add": _add,
        "radd": _swapped(operator.add),
        "sub subtract": _sub,
        "rsub": lambda x, other, *, alpha=1: _sub(other, x, alpha=alpha),
        "mul multiply rmul": _binary(operator.mul),
        "div divide true_divide truediv": _divide,
        "where": _where,
        "masked_fill": _masked_fill,
        "zeros_like": _filled(0),
        "ones_like": _filled(1),
        "full_like": _full_like,
        "detach": jax.lax.stop_gradient,
    }
)
