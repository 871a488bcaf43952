"""JAX forms of pointwise torch functions."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy import special

from megatree.runtime.jax.form import Form, table


def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:  # noqa: A002
    return input + (other if alpha == 1 else alpha * other)


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Any:  # noqa: A002
    return input - (other if alpha == 1 else alpha * other)


def _divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:  # noqa: A002
    if rounding_mode is None:
        return input / other
    return jnp.floor(input / other) if rounding_mode == "floor" else jnp.trunc(input / other)


def _power(input: Any, exponent: Any) -> Any:  # noqa: A002
    return operator.pow(input, exponent)


def _clamp(input: Array, min: Any = None, max: Any = None) -> Array:  # noqa: A002
    # Not jnp.clip, whose gradient at a bound is a half.
    if min is not None:
        input = jnp.where(input < min, min, input)  # noqa: A001
    return input if max is None else jnp.where(input > max, max, input)


def _softplus(input: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:  # noqa: A002
    scaled = input * beta
    linear = scaled > threshold  # torch's own shortcut, off by 2e-9 where it starts
    return jnp.where(linear, input, jnp.log1p(jnp.exp(jnp.where(linear, 0, scaled))) / beta)


def _gelu(input: Array, approximate: str = "none") -> Array:  # noqa: A002
    return jax.nn.gelu(input, approximate=approximate == "tanh")


def _leaky_relu(input: Array, negative_slope: float = 0.01, inplace: bool = False) -> Array:  # noqa: A002
    return jnp.where(input > 0, input, input * negative_slope)


def _hardtanh(
    input: Array,  # noqa: A002
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Array:
    return _clamp(input, min_val, max_val)


def _logit(input: Array, eps: float | None = None) -> Array:  # noqa: A002
    x = input if eps is None else _clamp(input, eps, 1 - eps)
    return jnp.log(x / (1 - x))


def _where(condition: Array, input: Any, other: Any) -> Array:  # noqa: A002
    return jnp.where(condition, input, other)


def _masked_fill(input: Array, mask: Array, value: Any) -> Array:  # noqa: A002
    return jnp.where(mask, value, input)


def _same(input: Array, *args: Any, **options: Any) -> Array:  # noqa: A002
    """Return the value; a cast is in the dtype that every result is given."""
    return input


def _filled(value: Any) -> Form:
    return lambda input, **options: _full_like(input, value)


def _full_like(input: Array, fill_value: Any, **options: Any) -> Array:  # noqa: A002
    return jnp.full_like(input, fill_value, dtype=jnp.result_type(fill_value))


def _swapped(form: Form) -> Form:
    """Return the form of a reflected operator."""
    return lambda input, other: form(other, input)


def _elu(input: Array, alpha: float = 1.0, inplace: bool = False) -> Array:  # noqa: A002
    return jax.nn.elu(input, alpha)


def _activation(form: Form) -> Form:
    return lambda input, inplace=False: form(input)


TABLE = table(
    {
        "abs": jnp.abs,
        "acos": jnp.arccos,
        "asin": jnp.arcsin,
        "atan": jnp.arctan,
        "atan2": jnp.arctan2,
        "ceil": jnp.ceil,
        "clamp": _clamp,
        "clamp_min": lambda input, min: _clamp(input, min),  # noqa: A006
        "clamp_max": lambda input, max: _clamp(input, None, max),  # noqa: A006
        "cos": jnp.cos,
        "cosh": jnp.cosh,
        "elu": _elu,
        "eq": operator.eq,
        "erf": special.erf,
        "erfc": special.erfc,
        "exp": jnp.exp,
        "exp2": jnp.exp2,
        "expm1": jnp.expm1,
        "floor": jnp.floor,
        "floor_divide floordiv": jnp.floor_divide,
        "fmod": jnp.fmod,
        "ge": operator.ge,
        "gelu": _gelu,
        "gt": operator.gt,
        "hardtanh": _hardtanh,
        "heaviside": jnp.heaviside,
        "isfinite": jnp.isfinite,
        "isinf": jnp.isinf,
        "isnan": jnp.isnan,
        "isneginf": jnp.isneginf,
        "isposinf": jnp.isposinf,
        "le": operator.le,
        "leaky_relu": _leaky_relu,
        "log": jnp.log,
        "log10": jnp.log10,
        "log1p": jnp.log1p,
        "log2": jnp.log2,
        "logaddexp": jnp.logaddexp,
        "logical_and": jnp.logical_and,
        "logical_not": jnp.logical_not,
        "logical_or": jnp.logical_or,
        "logical_xor": jnp.logical_xor,
        "logit": _logit,
        "logsigmoid": jax.nn.log_sigmoid,
        "lt": operator.lt,
        "maximum": jnp.maximum,
        "minimum": jnp.minimum,
        "mod remainder": jnp.remainder,
        "nan_to_num": jnp.nan_to_num,
        "ne": operator.ne,
        "pow": _power,
        "reciprocal": jnp.reciprocal,
        "relu": _activation(jax.nn.relu),
        "relu6": _activation(jax.nn.relu6),
        "round": lambda input, *, decimals=0: jnp.round(input, decimals),
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
        "xlogy": special.xlogy,
        "bitwise_and and": operator.and_,
        "bitwise_or or": operator.or_,
        "bitwise_xor xor": operator.xor,
        "bitwise_not invert": operator.invert,
        "bitwise_left_shift lshift": operator.lshift,
        "bitwise_right_shift rshift": operator.rshift,
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
        "rsub": lambda input, other, *, alpha=1: _sub(other, input, alpha=alpha),
        "mul multiply rmul": operator.mul,
        "div divide true_divide truediv": _divide,
        "where": _where,
        "masked_fill": _masked_fill,
        "zeros_like": _filled(0),
        "ones_like": _filled(1),
        "full_like": _full_like,
        "detach": jax.lax.stop_gradient,
    }
)
