"""Our types against `jax.typeof`: JAX's explicit mode infers every op's sharding by itself."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec
from torch import fx

from megatree.functional import embedding
from megatree.functional.signature import Signature
from megatree.parallel.comm import move
from megatree.parallel.model import ModelProgram
from megatree.parallel.ops.rule import functions
from megatree.parallel.types import P, ShardType
from megatree.runtime.jax.interpret import Interpreter, arrays_in, is_part
from megatree.runtime.jax.shardings import (
    abstract_array,
    explicit_mesh,
    from_partition_spec,
    partition_spec,
)
from megatree.runtime.jax.trace import annotation, trace_global
from megatree.runtime.jax.units import unit_function, unit_types

Verdict = tuple[str, str]
"""(kind, text): "same", "told", "summed", "silent" or "different", and what was judged or why."""


@dataclass(frozen=True, kw_only=True)
class TypeReport:
    """How JAX types the ops of a program, each from operands laid out as ours are.

    Args:
        same: op -> how often JAX inferred our type by itself.
        told: op -> how often JAX wants a new layout written out (a pending sum, a move, a look-up
            by cut indices) and accepted ours.
        summed: op -> how often JAX has the whole sum where we have a pending one.
        silent: op -> why JAX gives it no type.
        different: one line per op that JAX types otherwise.
    """

    same: Counter[str]
    told: Counter[str]
    summed: Counter[str]
    silent: Mapping[str, str]
    different: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{self.same.total()} types inferred alike, {self.told.total()} accepted, "
        counts += f"{self.summed.total()} summed at once by JAX, {len(self.different)} different"
        silent = [f"  JAX cannot type {op}: {why}" for op, why in sorted(self.silent.items())]
        return "\n".join([counts, *self.different, *silent])


def compare_model_types(program: ModelProgram) -> TypeReport:
    """Compare the types of all units of a lowered model with JAX's; see `compare_types`."""
    graphs = [
        trace_global(unit_function(program, name), program.layout, *unit_types(program, name)).graph
        for name in program.units
    ]
    return compare_types(graphs, program.layout.sizes)


def compare_types(graphs: list[fx.Graph], sizes: Mapping[str, int]) -> TypeReport:
    """Type every op of graphs over whole arrays in JAX's explicit mode, on no devices at all.

    An operand that is P is `unreduced` to JAX. I and R are both replicated: JAX has R too
    (`reduced`, whose cotangent is `unreduced`), but refuses such an operand beside a cut one.

    Args:
        graphs: of `trace_global`, typed for a mesh.
        sizes: mesh axis -> size.
    """
    mesh = explicit_mesh(sizes)
    verdicts = [
        (node.meta["op"], *judge(node, mesh, sizes))
        for graph in graphs
        for node in graph.nodes
        if node.op == "call_function" and _is_judged(node)
    ]

    def count(kind: str) -> Counter[str]:
        return Counter(op for op, found, _ in verdicts if found == kind)

    return TypeReport(
        same=count("same"),
        told=count("told"),
        summed=count("summed"),
        silent={op: text for op, found, text in verdicts if found == "silent"},
        different=tuple(text for _, found, text in verdicts if found == "different"),
    )


def _is_judged(node: fx.Node) -> bool:
    """Whether a node is an op: not an annotation beside its move, nor a part of several results."""
    return node.target is not annotation and not is_part(node)


def judge(node: fx.Node, mesh: AbstractMesh, sizes: Mapping[str, int]) -> Verdict:
    """Compare the types of one node's results with what JAX makes of its operands."""
    known = [x.meta["type"] for x in node.all_input_nodes]
    explicit = _Explicit({})
    kind = "same"
    try:
        theirs = _infer(explicit, node, known, mesh, sizes)
        if explicit.told:
            kind = "told"
            if node.meta.get("product") is not None:  # which dims stay cut, JAX infers by itself
                whole = [_without(ty, new_sums(node)) for ty in known]
                free = _infer(Interpreter({}), node, whole, mesh, sizes)
                theirs = [replace(t, spec=f.spec) for t, f in zip(theirs, free, strict=True)]
    except Exception as error:  # its refusals have many classes
        return "silent", str(error).split(". ")[0].split("\n")[0][:160]
    for ours, ty in zip(types_of(node), theirs, strict=True):
        if ty.spec != ours.spec or not set(ty.axes_in(P)) <= set(ours.axes_in(P)):
            text = f"{node.meta['source']}: {node.meta['op']}: {ours} here, {ty} in JAX"
            return "different", text
        if set(ours.axes_in(P)) != set(ty.axes_in(P)):
            kind = "summed"
    return kind, ""


def types_of(node: fx.Node) -> tuple[ShardType, ...]:
    """Return the types of a node's results."""
    types = node.meta["type"]
    return types if isinstance(types, tuple) else (types,)


def new_sums(node: fx.Node) -> set[str]:
    """Return the mesh axes over which a node makes a pending sum of values that are none."""
    known = [ty for x in node.all_input_nodes for ty in types_of(x)]
    pending = {axis for ty in types_of(node) for axis in ty.axes_in(P)}
    return {axis for axis in pending if all(ty.state(axis) != P for ty in known)}


def _infer(
    interpreter: Interpreter,
    node: fx.Node,
    known: list[ShardType],
    mesh: AbstractMesh,
    sizes: Mapping[str, int],
) -> list[ShardType]:
    """Return JAX's types of a node's results from operands of the given types."""
    operands = node.all_input_nodes
    arrays = [abstract_array(ty, mesh, explicit_spec(ty)) for ty in known]

    def run(*xs: Array) -> Any:
        return interpreter.node(node, dict(zip(operands, xs, strict=True)))

    with jax.sharding.use_abstract_mesh(mesh):
        outs = jax.tree.leaves(jax.eval_shape(run, *arrays))
    specs = [PartitionSpec() if out.sharding is None else out.sharding.spec for out in outs]
    return [
        from_partition_spec(spec, ty.shape, ty.dtype, sizes, grad=ty.grad)
        for spec, ty in zip(specs, types_of(node), strict=True)
    ]


def explicit_spec(ty: ShardType) -> PartitionSpec:
    """Return a type's spec with what JAX's ops take: cuts and pending sums."""
    return partition_spec(ty.spec, unreduced=frozenset(ty.axes_in(P)))


def _without(ty: ShardType, axes: set[str]) -> ShardType:
    """Return the type of an operand that is whole over some axes."""
    spec = tuple(tuple(a for a in dim if a not in axes) for dim in ty.spec)
    return replace(ty, spec=spec)


class _Explicit(Interpreter):
    """Runs nodes in explicit mode; `told` says that JAX had to be told the result's layout."""

    told = False

    def form(self, node: fx.Node) -> Callable[..., Any]:
        """Return what a node runs: a move is JAX's `reshard`."""
        if node.target is move:
            self.told = True
            return lambda x, src, dst: jax.sharding.reshard(x, explicit_spec(dst))
        return super().form(node)

    def lookup(self, node: fx.Node, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the form of a function, with its result's layout written out where JAX asks."""
        ty, *_ = types_of(node)
        new_sum = bool(new_sums(node))
        self.told = True
        if function is embedding.rule.fn:  # type: ignore[attr-defined]
            return lambda ids, table: table.at[ids].get(out_sharding=explicit_spec(ty))
        sig = node.meta.get("product")
        if new_sum and sig is not None and len(sig.operands) == 2:
            return lambda *args, **options: _dot(sig, arrays_in((args, options)), ty)
        if new_sum and function in functions("sum"):
            return lambda x, dim=None, keepdim=False, **_: _sum(x, dim, keepdim, ty)
        self.told = False
        return super().lookup(node, function)


def _dot(sig: Signature, operands: list[Array], ty: ShardType) -> Array:
    """Contract two operands; jnp.einsum loses a pending sum where it transposes."""
    (a, b), out = sig.operands, sig.outputs[0]
    both = [label for label in a if label in b]
    batch = [label for label in both if label in out]
    gone = [label for label in both if label not in out]
    numbers = (
        ([a.index(n) for n in gone], [b.index(n) for n in gone]),
        ([a.index(n) for n in batch], [b.index(n) for n in batch]),
    )
    order = [*batch, *(n for n in a if n not in both), *(n for n in b if n not in both)]
    spec = [ty.spec[out.index(label)] for label in order]
    laid = partition_spec(spec, unreduced=frozenset(ty.axes_in(P)))
    x, y = operands
    product = jax.lax.dot_general(x, y, numbers, out_sharding=laid)
    return jnp.transpose(product, [order.index(label) for label in out])


def _sum(x: Array, dim: Any, keepdim: bool, ty: ShardType) -> Array:
    """Sum with a pending result, which jnp.sum has no argument for."""
    dims = [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim or range(x.ndim))]
    spec = [axes for d, axes in enumerate(ty.spec) if not (keepdim and d in dims)]
    laid = partition_spec(spec, unreduced=frozenset(ty.axes_in(P)))
    total = jax.lax.reduce_sum(x, tuple(dims), out_sharding=laid)
    return jnp.expand_dims(total, sorted(dims)) if keepdim else total
