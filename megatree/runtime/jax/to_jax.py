"""`to_jax`: a global-view function as a JAX function, laid out by the same rules."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from megatree.functional.tree import flatten_with_paths
from megatree.parallel.layout import Layout
from megatree.runtime.jax.form import Form
from megatree.runtime.jax.interpret import Interpreter, Lay, abstract_of, as_given, trace_at
from megatree.runtime.jax.shardings import jax_mesh, spec_of_axes


def to_jax(
    fn: Callable[..., Any],
    layout: Layout | None = None,
    *,
    forms: Mapping[Callable[..., Any], Form] | None = None,
    devices: Sequence[Any] | None = None,
) -> Callable[..., Any]:
    """Return a function of JAX arrays that computes what `fn` computes of tensors.

    The result is traceable: `jax.jit`, `jax.grad` and `jax.vmap` apply. With a layout every
    `shard` is a sharding constraint by the layout's rules, and XLA's partitioner (GSPMD) chooses
    the collectives; lay the arguments out with `arrays_to_jax`. A `local_map` runs its `reference`
    on whole arrays, or its body as on one device. An op without a JAX form runs the torch
    functions of its body. Keyed random numbers have the same bits, which takes 64-bit integers:
    jax.config.update("jax_enable_x64", True).

    Args:
        fn: a pure function of trees of tensors, written as for `lower`; it is traced once per
            shapes of its arguments.
        layout: mesh and rules; None for one device.
        forms: JAX functions for ops, torch functions or `local_map` bodies of your own.
        devices: one per rank of the mesh; None takes `jax.devices()`.

    Returns:
        A function of the same trees of JAX arrays.

    Raises:
        ShardingError: (when called) an op has no JAX form, or what `lower` refuses; the message
            names the op and the line.

    Reference: DESIGN section 3.
    """
    own = {_key(function): form for function, form in (forms or {}).items()}
    lay = as_given if layout is None else laid_on(layout, jax_mesh(layout, devices))
    interpreter = Interpreter(own, lay)

    traced = functools.cache(functools.partial(trace_at, fn))

    def call(*args: Any) -> Any:
        _, leaves, tree = flatten_with_paths(args)
        arrays = [jnp.asarray(x) for x in leaves]
        return interpreter.results(traced(tree, tuple(map(abstract_of, arrays))), arrays)

    call.__name__ = getattr(fn, "__name__", type(fn).__name__)
    call.__doc__ = fn.__doc__
    return call


def laid_on(layout: Layout, mesh: Mesh) -> Lay:
    """Return what a `shard` does on a mesh: constrain the value to what the rules say."""

    def lay(x: Array, axes: str, source: str) -> Array:
        spec = spec_of_axes(layout, axes, x.shape, f"{source}: shard {axes!r}")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return lay


def _key(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a graph calls for a function: the one under an op or a `local_map`."""
    for mark in ("rule", "local_map"):
        if hasattr(function, mark):
            return getattr(function, mark).fn
    return function
