"""Run a graph over whole arrays in JAX, op by op."""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optree
import torch
from jax import Array
from torch import fx

from megatree.functional.comm import SINGLE
from megatree.functional.local_map import LocalMap
from megatree.functional.tree import flatten_with_paths
from megatree.parallel.bodies import run_body
from megatree.parallel.comm import move
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout
from megatree.parallel.lower import Traced
from megatree.parallel.scoped import factory, scoped_op
from megatree.parallel.typed import map_structure
from megatree.parallel.types import ShardType, make_type
from megatree.runtime.jax.form import Form, dtype_of
from megatree.runtime.jax.forms import FORMS
from megatree.runtime.jax.keys import check_64_bits
from megatree.runtime.jax.ops_contraction import contract
from megatree.runtime.jax.trace import annotation, jax_call, trace_global

Lay = Callable[[Array, str, str], Array]
"""Lay a value out by its logical axes, at a line of the user's program."""


def as_given(x: Array, axes: str, source: str) -> Array:
    """Leave a value where it is: the layout of one device."""
    return x


class Interpreter:
    """Runs traced functions on JAX arrays.

    Args:
        forms: forms of the user's own, which come first: function under the op -> form.
        lay: what a `shard` does.
    """

    def __init__(self, forms: Mapping[Callable[..., Any], Form], lay: Lay = as_given) -> None:
        self.forms, self.lay = forms, lay

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Trace a function of trees of tensors at the shapes of the arrays, and run it on them."""
        _, leaves, tree = flatten_with_paths(args)
        leaves = [jnp.asarray(x) for x in leaves]
        traced = trace_at(fn, tree, tuple(map(abstract_of, leaves)))
        return self.results(traced, leaves)

    def results(self, traced: Traced, leaves: Sequence[Array]) -> Any:
        """Run a traced function on the leaves of its arguments."""
        return optree.tree_unflatten(traced.out_tree, list(self.run(traced.graph, leaves)))

    def run(self, graph: fx.Graph, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run a graph; the values are those of its placeholders, in order."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                return tuple(values[x] for x in node.args[0])
            else:
                try:
                    with jax.named_scope(_line(node)):
                        values[node] = self.node(node, values)
                except Exception as error:
                    error.add_note(f"in {node.meta['op']} at {_line(node)}, run by to_jax")
                    raise
        raise AssertionError("a graph without an output")

    def node(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Run one node and give its results the dtypes of the torch function's."""

        def value(x: Any) -> Any:
            if isinstance(x, fx.Node):
                return values[x]
            check_bits(node, x)
            return x

        args, kwargs = map_structure(value, (tuple(node.args), dict(node.kwargs)))
        out = self.form(node)(*args, **kwargs)
        types = node.meta["type"]
        if isinstance(types, tuple):
            return tuple(_cast(x, ty) for x, ty in zip(out, types, strict=True))
        return _cast(out, types)

    def form(self, node: fx.Node) -> Form:
        """Return what a node runs: its arguments are those of the node."""
        target: Any = node.target
        first: Any = node.args[0]
        if is_part(node):
            return operator.getitem
        if target is move:
            return lambda x, src, dst: x
        if target is annotation:
            return lambda x, axes: self.lay(x, axes, _line(node))
        if target is jax_call:
            return lambda fn, *args: tuple(jax.tree.leaves(fn.jax_function(*args)))
        if target is run_body:
            return partial(self.body, node)
        if target is factory:
            made = self.lookup(node, first)
            return lambda fn, *args, **options: made(*args, **options)
        if target is scoped_op:
            found = self.lookup(node, first)
            return lambda fn, table, *args, **options: found(*args, **options)
        return self.lookup(node, target)

    def lookup(self, node: fx.Node, function: Callable[..., Any]) -> Form:
        """Return the form of a function: the user's, JAX's own, the contraction, or the body's."""
        if function in self.forms:
            return self.forms[function]
        if hasattr(function, "jax_function"):
            return function.jax_function
        if node.meta.get("product") is not None:
            return lambda *args, **options: contract(
                node.meta["product"], *arrays_in((args, options))
            )
        if function in FORMS:
            return FORMS[function]
        if _is_torch(function):
            raise ShardingError(
                f"{_line(node)}: {node.meta['op']}: this torch function has no JAX form. "
                "Give one, to_jax(fn, forms={torch.<name>: jax function}), or use the vocabulary."
            )
        body = partial(function, SINGLE) if node.target is scoped_op else function
        return lambda *args, **options: self.inline(node, partial(body, **options), args)

    def body(
        self, node: fx.Node, spec: LocalMap, table: Mapping[str, Any], *operands: Array
    ) -> Any:
        """Run the reference of a `local_map`, or its body on one device; lay the results out."""
        if spec.fn in self.forms:
            out = self.forms[spec.fn](*operands)
        else:
            out = self.inline(node, spec.reference or partial(spec.fn, SINGLE), operands)
        outs = (out,) if spec.single_output else tuple(out)
        laid = tuple(
            self.lay(x if declared.grad else jax.lax.stop_gradient(x), declared.axes, _line(node))
            for x, declared in zip(outs, spec.out_axes, strict=True)
        )
        return laid[0] if spec.single_output else laid

    def inline(self, node: fx.Node, fn: Callable[..., Any], operands: Sequence[Any]) -> Any:
        """Trace the body of an op or a `local_map` in its turn; operands may be absent (None)."""
        given = [i for i, x in enumerate(operands) if isinstance(x, Array)]

        def of_arrays(*arrays: Any) -> Any:
            full = list(operands)
            for i, x in zip(given, arrays, strict=True):
                full[i] = x
            return fn(*full)

        try:
            return self.call(of_arrays, *(operands[i] for i in given))
        except ShardingError as error:
            raise ShardingError(
                f"{_line(node)}: {node.meta['op']}: has no JAX form, and its body cannot be "
                f"traced: {error} Or give a form: to_jax(fn, forms={{function: jax function}})."
            ) from error


def trace_at(
    fn: Callable[..., Any], tree: optree.PyTreeSpec, types: tuple[ShardType, ...]
) -> Traced:
    """Trace a function for one structure of its arguments and the types of their leaves."""
    return trace_global(fn, Layout(), *optree.tree_unflatten(tree, types))


def abstract_of(x: Any) -> ShardType:
    """Return the type of a JAX array on one device."""
    dtype = getattr(torch, str(x.dtype))
    return make_type(
        tuple(x.shape), dtype, ((),) * x.ndim, {}, grad=jnp.issubdtype(x.dtype, jnp.floating)
    )


def check_bits(node: fx.Node, constant: Any) -> None:
    """Refuse a 64-bit constant, a mixing word of a key, where JAX would cut it to 32 bits."""
    if type(constant) is int and abs(constant) >= 1 << 32:
        check_64_bits(f"{_line(node)}: {node.meta['op']}")


def is_part(node: fx.Node) -> bool:
    """Whether a node only takes one of several results of another."""
    source = node.args[0]
    several = isinstance(source, fx.Node) and isinstance(source.meta["type"], tuple)
    return node.target is operator.getitem and several


def _line(node: fx.Node) -> str:
    return node.meta["source"]


def _is_torch(function: Any) -> bool:
    module = getattr(function, "__module__", None) or getattr(function, "__objclass__", torch)
    return not isinstance(module, str) or module.split(".")[0] == "torch"


def arrays_in(tree: Any) -> list[Array]:
    """Return the arrays among the arguments of a call, in order."""
    return [x for x in jax.tree.leaves(tree) if isinstance(x, Array)]


def _cast(x: Any, ty: ShardType) -> Array:
    x = jnp.asarray(x)
    dtype = dtype_of(ty.dtype)
    return x if x.dtype == dtype else x.astype(dtype)
