"""Trace a function for JAX: a graph over whole arrays, in which every `shard` is a node."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import optree

from megatree.functional.comm import SINGLE
from megatree.functional.op import OpRule
from megatree.parallel.context import DEFAULT
from megatree.parallel.lower import Traced, trace
from megatree.parallel.scoped import scoped_op
from megatree.parallel.tracer import Localise, Tracer
from megatree.parallel.typed import TypedTensor, map_structure, typed_leaves
from megatree.parallel.types import ShardType, make_type


def annotation(x: Any, axes: str, source: str) -> Any:
    """Graph target of `shard`: the identity, laid out by the rules."""
    return x


def jax_call(function: Callable[..., Any], *args: Any) -> Any:
    """Graph target of a `from_jax` function: a flat tuple of its results."""
    return tuple(optree.tree_leaves(function(*args)))


class GlobalTracer(Tracer):
    """A tracer whose graph is over whole arrays; the types are those of the layout."""

    def operation(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sig: Any,
        *,
        evaluate: Callable[..., Any] | None = None,
        localise: Localise | None = None,
        comm_table: bool = False,
        communicates: bool = False,
    ) -> Any:
        """Type and emit a call as `Tracer` does, with global sizes in its arguments."""

        def keep_whole(types: list[ShardType], args: Any, kwargs: Any) -> Any:
            assert localise is not None
            return localise([_uncut(ty) for ty in types], args, kwargs)

        return super().operation(
            name,
            func,
            args,
            kwargs,
            sig,
            evaluate=evaluate,
            localise=keep_whole if localise else None,
            comm_table=comm_table,
            communicates=communicates,
        )

    def lowered_op(self, rule: OpRule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Emit an op on whole arrays, laid out like its first operand, however it is lowered."""
        first = args[0] if args else None
        how = dict(self.layout.rules.lower).get(rule.name, DEFAULT.get(rule.name))
        if how is None or not isinstance(first, TypedTensor) or not how.applies(args):
            return self.declared_op(rule, args, kwargs)
        plain = map_structure(lambda x: x.plain if isinstance(x, TypedTensor) else x, args)
        meta = rule.fn(SINGLE, *plain, **kwargs)
        ty = replace(first.type_, shape=tuple(meta.shape), dtype=meta.dtype)
        return self.emit(scoped_op, (rule.fn, {}, *args), kwargs, [ty], [meta], op=rule.name)

    def shard(self, x: TypedTensor, axes: str) -> TypedTensor:
        """Check and lay out as `Tracer` does, and keep the annotation."""
        laid = super().shard(x, axes)
        return self.emit(annotation, (laid, axes), {}, [laid.type_], [laid.plain], op="shard")

    def dispatch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Handle a call; one of a `from_jax` function becomes a node of its own."""
        if hasattr(func, "jax_function"):
            return self.jax_function(func, args)
        return super().dispatch(func, args, kwargs)

    def jax_function(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Emit a call of a `from_jax` function, which takes and returns trees."""
        grad = any(x.type_.grad for x in typed_leaves(args))
        plain = map_structure(lambda x: x.plain if isinstance(x, TypedTensor) else x, args)
        out = func(*plain)
        leaves, tree = optree.tree_flatten(out)
        types = [
            make_type(
                tuple(leaf.shape),
                leaf.dtype,
                ((),) * leaf.dim(),
                self.mesh_sizes,
                grad=grad and leaf.is_floating_point(),
            )
            for leaf in leaves
        ]
        flat = self.emit(jax_call, (func, *args), {}, types, leaves, op=func.__name__, single=False)
        return optree.tree_unflatten(tree, list(flat))


def _uncut(ty: ShardType) -> ShardType:
    return replace(ty, spec=((),) * len(ty.shape))


def trace_global(
    fn: Callable[..., Any], layout: Any, *abstract: Any, sizes: Mapping[str, int] | None = None
) -> Traced:
    """Trace a function into a graph over whole arrays; see `megatree.parallel.lower.trace`.

    Whole arrays are in natural order: that of a layout's shards is ours alone.
    """
    layout = replace(layout, order=None)
    return trace(fn, layout, *abstract, sizes=sizes, tracer=GlobalTracer(layout))
