"""Trace a global-view function once, type every op, and emit a graph over local tensors."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from megatree.functional.annotate import as_partial, shard
from megatree.functional.comm import SINGLE
from megatree.functional.op import OpRule
from megatree.functional.param import axis_names
from megatree.functional.signature import Signature, parse
from megatree.parallel import hazards
from megatree.parallel.bodies import trace_body, try_locally
from megatree.parallel.comm import move
from megatree.parallel.context import DEFAULT
from megatree.parallel.engine import Inference, Refusal, infer
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, check_spec
from megatree.parallel.ops import RULES
from megatree.parallel.ops.order import ANY_ORDER
from megatree.parallel.ops.rule import canonical
from megatree.parallel.order import reorder
from megatree.parallel.scoped import Scope, scoped_op
from megatree.parallel.sources import user_line
from megatree.parallel.typed import TypedTensor, map_structure, typed_leaves
from megatree.parallel.types import I, P, R, S, ShardType, make_type

Localise = Callable[[list[ShardType], tuple[Any, ...], dict[str, Any]], tuple[Any, dict[str, Any]]]


class Tracer:
    """One trace: the graph so far, the sizes that names are bound to, and the free I -> R moves.

    Args:
        layout: mesh and rules.
        sizes: axis name -> the size it must have wherever it is used.
        unit: the segment of a chain that is traced, if it is one.
    """

    def __init__(
        self, layout: Layout, sizes: Mapping[str, int] | None = None, unit: str = ""
    ) -> None:
        self.unit = unit
        self.layout = layout
        self.mesh_sizes = layout.sizes
        self.graph = fx.Graph()
        self.sizes = sizes or {}
        self.bound: dict[str, tuple[int, str]] = {}
        self.widened: dict[tuple[fx.Node, frozenset[str]], TypedTensor] = {}
        self.contexts = hazards.snapshot()
        self.open = True

    # -- values ------------------------------------------------------------------------------

    def placeholder(
        self, name: str, ty: ShardType, names: Sequence[str] | None, *, leaf: bool
    ) -> TypedTensor:
        """Add an input; a leaf is a parameter, whose gradient the runtime reduces."""
        node = self.graph.placeholder(name.replace(".", "_"))
        node.meta.update(type=ty, source=f"input {name}", op="input", leaf=leaf, path=name)
        for axis, size in zip(names or (), ty.shape, strict=False):
            self.bind(axis, size, f"input {name}")
        plain = torch.empty(ty.shape, dtype=ty.dtype, device="meta")
        return TypedTensor.make(plain, node, ty, self)

    def bind(self, name: str, size: int, place: str) -> None:
        """Bind a logical axis name to a size; a second size is an error."""
        if name == "_":
            return
        first = (self.sizes[name], "the model's sizes") if name in self.sizes else (size, place)
        known, where = self.bound.setdefault(name, first)
        if known != size:
            raise ShardingError(
                f"{place}: axis {name!r} has size {size} here and size {known} at {where}. "
                "Name the dims in their order; two different axes need two names."
            )

    def emit(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        types: Sequence[ShardType],
        plains: Sequence[Tensor],
        *,
        op: str,
        single: bool = True,
    ) -> Any:
        """Add a call over local tensors; several outputs come back as a tuple."""

        def node_of(x: Any) -> Any:
            return x.node if isinstance(x, TypedTensor) else x

        source = user_line()
        node = self.graph.call_function(
            target, map_structure(node_of, args), map_structure(node_of, dict(kwargs))
        )
        node.meta.update(type=types[0] if single else tuple(types), source=source, op=op)
        if single:
            return TypedTensor.make(plains[0], node, types[0], self)
        out = []
        for i, (ty, plain) in enumerate(zip(types, plains, strict=True)):
            item = self.graph.call_function(operator.getitem, (node, i))
            item.meta.update(type=ty, source=source, op=op)
            out.append(TypedTensor.make(plain, item, ty, self))
        return tuple(out)

    def move(self, x: TypedTensor, dst: ShardType) -> TypedTensor:
        """Add a transition to another type of the same value."""
        return self.emit(move, (x, x.type_, dst), {}, [dst], [x.plain], op="move")

    def in_order(self, x: TypedTensor, permuted: tuple[int, ...]) -> TypedTensor:
        """Put whole dims into the layout's order, or back into natural order."""
        for dim in sorted({*x.type_.permuted} ^ {*permuted}):
            assert not x.type_.spec[dim], f"{x.type_}: dim {dim} is cut"
            leaves = dim in x.type_.permuted
            now = {*x.type_.permuted} ^ {dim}
            ty = replace(x.type_, permuted=tuple(sorted(now)))
            args = (x, dim, self.layout.num_chunks, leaves)
            x = self.emit(reorder, args, {}, [ty], [x.plain], op="reorder")
        return x

    def replicate(self, x: TypedTensor, axes: frozenset[str]) -> TypedTensor:
        """Return the value as R over the axes: free forward, a sum backward; once per value."""
        if not axes or not x.type_.grad:
            return x
        key = (x.node, axes)
        if key not in self.widened:
            self.widened[key] = self.move(x, x.type_.with_kinds(dict.fromkeys(axes, R)))
        return self.widened[key]

    # -- ops ---------------------------------------------------------------------------------

    def operation(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sig: Signature,
        *,
        evaluate: Callable[..., Any] | None = None,
        localise: Localise | None = None,
        comm_table: bool = False,
        communicates: bool = False,
    ) -> Any:
        """Type a call by its signature, evaluate its shapes on meta tensors and emit it.

        Args:
            name: the op's name in errors.
            func: what to call on local tensors.
            args, kwargs: as the user gave them; typed tensors in them are the operands, in order.
            sig: the signature, one entry per operand.
            evaluate: what to call on whole meta tensors to learn the outputs' shapes; None: func.
            localise: rewrites global sizes in the arguments into local ones.
            comm_table: hand `func` the mesh axes of the signature's labels (see `scoped_op`).
            communicates: whether `func` talks over labels that it does not own.
        """
        operands = typed_leaves((args, kwargs))
        inference = self.infer(name, sig, operands)
        plain_args, plain_kwargs = map_structure(_plain, (args, dict(kwargs)))
        meta = (evaluate or func)(*plain_args, **plain_kwargs)
        single = isinstance(meta, Tensor)
        metas = [meta] if single else list(meta)
        types = self.output_types(name, inference, operands, metas)
        converted = iter(
            [self.replicate(x, axes) for x, axes in zip(operands, inference.replicate, strict=True)]
        )
        args, kwargs = map_structure(
            lambda x: next(converted) if isinstance(x, TypedTensor) else x, (args, dict(kwargs))
        )
        if localise is not None:
            args, kwargs = localise(types, args, dict(kwargs))
        calls: list[Any] = []
        if comm_table:
            table = self.scope(sig, operands)
            if communicates or any(table.get(label) for label in sig.own):
                _, calls = try_locally(func, table, self.mesh_sizes, args, kwargs)
            args, func = (func, table, *args), scoped_op
        out = self.emit(func, args, kwargs, types, metas, op=name, single=single)
        node = out.node if single else out[0].node.args[0]
        node.meta["calls"] = tuple(calls)
        node.meta["product"] = sig if sig.product else None
        return out

    def scope(self, sig: Signature, operands: Sequence[TypedTensor]) -> Scope:
        """Return what a comm over the signature's labels must know."""
        table, chunks = {}, {}
        for labels, x in zip(sig.operands, operands, strict=True):
            for dim, (label, axes) in enumerate(zip(labels, x.type_.spec, strict=True)):
                if label is not None:
                    table[label] = axes
                    if dim in x.type_.permuted:
                        chunks[label] = self.layout.num_chunks
        return Scope(table, chunks)

    def infer(self, name: str, sig: Signature, operands: Sequence[TypedTensor]) -> Inference:
        """Type an op, or say where its operands come from and why it is refused."""
        try:
            return infer(
                sig,
                [x.type_ for x in operands],
                self.mesh_sizes,
                any_order=name in ANY_ORDER,
            )
        except Refusal as refusal:
            created = ""
            if refusal.pending is not None:
                i, axis = refusal.pending
                made = origin_of_sum(operands[i].node, axis)
                created = f" The sum was created at {made.meta['source']} ({made.meta['op']})."
            raise ShardingError(
                f"{user_line()}: {name}: {refusal.why}.{created} {refusal.fix}."
            ) from None

    def output_types(
        self,
        name: str,
        inference: Inference,
        operands: Sequence[TypedTensor],
        metas: Sequence[Tensor],
    ) -> list[ShardType]:
        """Build the outputs' types from an inference and the meta tensors of the results."""
        grad = any(x.type_.grad for x in operands)
        types = []
        for spec, permuted, meta in zip(inference.specs, inference.permuted, metas, strict=True):
            shape = tuple(meta.shape)
            assert len(spec) == len(shape), (
                f"{name}: signature gives {len(spec)} dims, result {shape}"
            )
            check_spec(
                spec,
                tuple(str(d) for d in range(len(shape))),
                shape,
                self.mesh_sizes,
                f"{user_line()}: {name}",
            )
            types.append(
                make_type(
                    shape,
                    meta.dtype,
                    spec,
                    self.mesh_sizes,
                    kinds=inference.kinds,
                    grad=grad and meta.is_floating_point(),
                    permuted=permuted,
                )
            )
        return types

    def declared_op(self, rule: OpRule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Type and emit a call of a function declared with `op`."""
        operands = [x for x in args if isinstance(x, TypedTensor)]
        names = [
            name for name, x in zip(rule.operands, args, strict=False) if isinstance(x, TypedTensor)
        ]
        if extra := [key for key, value in kwargs.items() if typed_leaves(value)]:
            raise ShardingError(
                f"{user_line()}: {rule.name}: option {extra[0]!r} is a tensor, and options are "
                "static. Make it an operand (before the * of the op's parameters)."
            )
        ranks = [x.dim() for x in operands]
        text = rule.text(ranks, names)
        try:
            sig = replace(parse(text, ranks, rule.linear), product=rule.product)
        except ValueError as error:
            raise ShardingError(f"{user_line()}: {rule.name}: {error}") from None
        evaluate = (lambda *a, **k: rule.fn(SINGLE, *a, **k)) if rule.comm else rule.fn
        return self.operation(
            rule.name,
            rule.fn,
            args,
            kwargs,
            sig,
            evaluate=evaluate,
            comm_table=rule.comm,
            communicates=rule.communicates,
        )

    def lowered_op(self, rule: OpRule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Emit an op as the rules say it is lowered; as it is if they say nothing."""
        how = dict(self.layout.rules.lower).get(rule.name, DEFAULT.get(rule.name))
        if how is None:
            return self.declared_op(rule, args, kwargs)
        return how.lower(self, rule, args, kwargs)

    # -- annotations -------------------------------------------------------------------------

    def shard(self, x: TypedTensor, axes: str) -> TypedTensor:
        """Lay a value out by the rules; see `megatree.functional.annotate.shard`."""
        place = f"{user_line()}: shard {axes!r}"
        names = axis_names(axes, place)
        if len(names) != x.dim():
            raise ShardingError(
                f"{place}: names {len(names)} axes, the value has {x.dim()} dims {tuple(x.shape)}. "
                "Give one name per dim."
            )
        for name, size in zip(names, x.type_.shape, strict=True):
            self.bind(name, size, place)
        spec = self.layout.spec(names, x.type_.shape, place)
        ty = x.type_
        keep = dict.fromkeys(ty.axes_in(R), R)  # P and S end as I, R stays R
        permuted = self.layout.permuted(names)
        if changed := {*ty.permuted} ^ {*permuted}:
            whole = tuple(() if d in changed else axes for d, axes in enumerate(spec))
            mid = make_type(
                ty.shape,
                ty.dtype,
                whole,
                self.mesh_sizes,
                kinds=keep,
                grad=ty.grad,
                permuted=ty.permuted,
            )
            x = self.in_order(x if mid == ty else self.move(x, mid), permuted)
        dst = make_type(
            ty.shape,
            ty.dtype,
            spec,
            self.mesh_sizes,
            kinds=keep,
            grad=ty.grad,
            permuted=permuted,
        )
        return x if dst == x.type_ else self.move(x, dst)

    def as_partial(self, x: TypedTensor, axis: str) -> TypedTensor:
        """Turn I or R over the mesh axes of a logical axis into a pending sum."""
        ty, axes = x.type_, self.layout.axes(axis)
        for a in axes:
            if ty.state(a) == S:
                raise ShardingError(
                    f"{user_line()}: as_partial: {ty} is cut over {a!r}. "
                    "shard(x, ...) it whole first."
                )
        dst = ty.with_kinds(dict.fromkeys(axes, P))
        return x if dst == ty else self.move(x, dst)

    def finish(self, x: TypedTensor) -> TypedTensor:
        """Make a result S, I or P: an R result would seed one gradient per rank."""
        ty = x.type_
        over = ty.axes_in(R)
        return self.move(x, ty.with_kinds(dict.fromkeys(over, I))) if over else x

    # -- dispatch ----------------------------------------------------------------------------

    def dispatch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Handle a torch call made by the traced function."""
        operands = typed_leaves((args, kwargs))
        if hazards.is_metadata(func):
            return func(*map_structure(_plain, args), **map_structure(_plain, kwargs))
        rule = RULES.get(func)
        if not operands and (rule is None or not rule.is_factory):
            return func(*args, **kwargs)  # a constant of plain tensors; mixing it in is refused
        name = _name_of(func)
        hazards.check(self, name, func, args, kwargs, operands)
        if func is shard:
            return self.shard(*args, **kwargs)
        if func is as_partial:
            return self.as_partial(*args, **kwargs)
        if hasattr(func, "local_map"):
            return trace_body(self, func.local_map, args)
        if hasattr(func, "rule"):
            return self.lowered_op(func.rule, args, kwargs)
        if rule is None:
            types = ", ".join(str(x.type_) for x in operands)
            raise ShardingError(
                f"{user_line()}: no sharding rule for {name} (operands {types}). Declare it with "
                '@op("..."), write it with the vocabulary, or wrap the code in local_map.'
            )
        return rule.apply(self, name, func, *canonical(args, kwargs))


def _name_of(func: Callable[..., Any]) -> str:
    """Return a torch function's name; that of the attribute for the getter of a property."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(func.__self__, "__name__", name)  # type: ignore[attr-defined]
    return name.strip("_")


def _plain(x: Any) -> Any:
    return x.plain if isinstance(x, TypedTensor) else x


def origin_of_sum(node: fx.Node, axis: str) -> fx.Node:
    """Return the node at which a pending sum over a mesh axis came to be."""

    def pending(n: fx.Node) -> bool:
        ty = n.meta.get("type")
        return isinstance(ty, ShardType) and ty.state(axis) == P

    while True:
        before = next((n for n in node.all_input_nodes if pending(n)), None)
        if before is None:
            return node
        node = before
