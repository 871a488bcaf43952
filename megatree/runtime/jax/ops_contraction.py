"""The JAX form of every product: one einsum over the labels that the op was typed by."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from megatree.functional.signature import Signature
from megatree.runtime.jax.form import table


def contract(sig: Signature, *operands: Array, out_sharding: Any = None) -> Array:
    """Contract the operands as a product's signature says; exact in the operands' dtype.

    Args:
        sig: of an op that is exactly the contraction that its labels spell.
        operands: in the signature's order.
        out_sharding: how to lay the result out (explicit mode of JAX); None: JAX decides.
    """
    names = {x for labels in (*sig.operands, *sig.outputs) for x in labels if x is not None}
    number = {name: i for i, name in enumerate(sorted(names))}
    flat: list[Any] = []
    for labels, x in zip(sig.operands, operands, strict=True):
        stretched = tuple(d for d, label in enumerate(labels) if label is None)  # of size 1
        flat += [
            jnp.squeeze(x, stretched) if stretched else x,
            [number[label] for label in labels if label is not None],
        ]
    out = [number[label] for label in sig.outputs[0] if label is not None]
    options = {} if out_sharding is None else {"out_sharding": out_sharding}
    return jnp.einsum(*flat, out, precision=jax.lax.Precision.HIGHEST, **options)


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    """Return the product with a bias; without one it is a plain contraction."""
    return jnp.einsum("...k,ok->...o", x, weight, precision=jax.lax.Precision.HIGHEST) + bias


TABLE = table({"linear": _linear})
