"""Keyed random bits in JAX: SplitMix64 in uint64, the same bits as `megatree.functional.keys`."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from megatree.runtime.jax.form import has_64_bits

_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def keep_mask(key: int | Array, shape: tuple[int, ...], rate: float) -> Array:
    """Return a bool mask of a whole array that is False with probability `rate`.

    Args:
        key: 64-bit, an int or a 0-d int64 array.
        shape: of the mask; an element's bit depends on the key and its row-major index only.
        rate: probability in [0, 1).

    Raises:
        ValueError: JAX has 64-bit integers switched off.
    """
    check_64_bits("dropout")
    index = jax.lax.iota(jnp.uint64, math.prod(shape)).reshape(shape)
    word = key % (1 << 64) if isinstance(key, int) else key.astype(jnp.uint64)
    bits = _mix(_mix(index * jnp.uint64(_GOLDEN) + jnp.asarray(word, jnp.uint64)))
    return (bits >> jnp.uint64(33)) >= jnp.uint64(round(rate * (1 << 31)))


def check_64_bits(place: str) -> None:
    """Refuse to mix keys in 32 bits, which would give other random numbers than torch."""
    if not has_64_bits():
        raise ValueError(
            f"{place}: keyed random numbers are 64-bit integers, which JAX has switched off. "
            "Set jax.config.update('jax_enable_x64', True)."
        )


def _mix(x: Array) -> Array:
    x = (x ^ (x >> jnp.uint64(30))) * jnp.uint64(_M1)
    x = (x ^ (x >> jnp.uint64(27))) * jnp.uint64(_M2)
    return x ^ (x >> jnp.uint64(31))
