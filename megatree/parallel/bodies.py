"""`local_map` in a trace: check the declarations, try the body at local shapes, emit it as one
node.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatree.functional.annotate import as_partial, shard
from megatree.functional.local_map import LocalMap, Out
from megatree.functional.param import axis_names
from megatree.parallel.comm import Axes, BodyComm, RankComm
from megatree.parallel.errors import ShardingError
from megatree.parallel.sources import user_line
from megatree.parallel.typed import TypedTensor, map_structure
from megatree.parallel.types import I, P, R, S, ShardType, make_type

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer


@dataclass(frozen=True)
class BodyCall:
    """One collective of a body or an op, with the bytes of one rank's larger side."""

    kind: str
    axes: Axes
    bytes: int
    phase: str = "forward"


def run_body(comm: RankComm, spec: LocalMap, table: dict[str, Axes], *local: Tensor) -> Any:
    """Graph target: call a body with a comm over its logical axes."""
    return spec.fn(BodyComm(comm, table), *local)


class _Local(Tensor):
    """A meta tensor that stands for one rank's shard while a body is tried."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (shard, as_partial):
            raise ShardingError(
                f"{user_line()}: {func.__name__} inside a local_map body, where values are local "
                "and it would do nothing. Use comm's collectives, or annotate outside the body."
            )
        if hasattr(func, "local_map"):
            raise ShardingError(
                f"{user_line()}: local_map {func.local_map.name} inside a local_map body, where it "
                "would run as on one device. Call its body with this body's comm."
            )
        if getattr(func, "rule", None) is not None and _draws(func, args, kwargs or {}):
            raise ShardingError(
                f"{user_line()}: {func.rule.name} inside a local_map body draws its mask by local "
                "index: the same mask on every shard. Apply dropout outside the body."
            )
        return super().__torch_function__(func, types, args, kwargs or {})


def _draws(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an op draws by element index here."""
    return kwargs.get("rate", 0.0) > 0.0 or kwargs.get("dropout", 0.0) > 0.0


@dataclass
class ShapeComm(RankComm):
    """A comm that moves nothing: shapes of the results, and a record of the calls."""

    sizes: Mapping[str, int]
    coords: Mapping[str, int]
    calls: list[BodyCall] = field(default_factory=list)
    phase: str = "forward"
    device: Any = "meta"
    plans: bool = True

    def _note(self, kind: str, x: Tensor, axes: Axes) -> None:
        self.calls.append(BodyCall(kind, axes, x.numel() * x.element_size(), self.phase))

    def psum(self, x: Tensor, axes: Axes) -> Tensor:
        self._note("psum", x, axes)
        return torch.empty_like(x)

    def pmax(self, x: Tensor, axes: Axes) -> Tensor:
        self._note("pmax", x, axes)
        return torch.empty_like(x)

    def all_gather(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        whole = torch.cat([x] * self.size(axes), dim)
        self._note("all_gather", whole, axes)
        return whole

    def psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        self._note("psum_scatter", x, axes)
        return x.chunk(self.size(axes), dim)[0].clone()

    def all_to_all(self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int) -> Tensor:
        self._note("all_to_all", x, axes)
        return torch.cat(x.chunk(self.size(axes), split_dim), concat_dim)

    def all_to_all_v(self, x: Tensor, axes: Axes, send: list[int], recv: list[int]) -> Tensor:
        self._note("all_to_all_v", x, axes)
        return x.new_empty(sum(recv), *x.shape[1:])

    def ppermute(self, x: Tensor, axes: Axes, shift: int) -> Tensor:
        self._note("ppermute", x, axes)
        return torch.empty_like(x)


def trace_body(tracer: "Tracer", spec: LocalMap, operands: Sequence[Any]) -> Any:
    """Type and emit a call of a `local_map` function.

    Raises:
        ShardingError: an operand is laid out otherwise than declared or is a pending sum, or an
            output does not say what it is over an axis on which an input varies.
    """
    place = f"{user_line()}: local_map {spec.name}"
    for i, x in enumerate(operands):
        if not isinstance(x, TypedTensor):
            raise ShardingError(f"{place}: operand {i} is a plain tensor. Pass it as an input.")
    touched = _check_operands(tracer, spec, operands, place)
    converted = [
        tracer.replicate(x, frozenset(a for a in touched if x.type_.state(a) == I))
        for x in operands
    ]
    names = {
        name
        for text in (*spec.in_axes, *(o.axes for o in spec.out_axes))
        for name in text.split()
        if name != "_"
    }
    names |= {*spec.over, *(a for o in spec.out_axes for a in (*o.partial, *o.replicated))}
    table = {name: tracer.layout.axes(name) for name in sorted(names)}
    locals_, calls = _try_body(tracer, spec, table, operands, place) if spec.static else (None, [])
    types = [
        _output_type(tracer, spec, out, i, operands, touched, locals_, place)
        for i, out in enumerate(spec.out_axes)
    ]
    plains = [torch.empty(ty.shape, dtype=ty.dtype, device="meta") for ty in types]
    result = tracer.emit(
        run_body,
        (spec, table, *converted),
        {},
        types,
        plains,
        op=f"local_map {spec.name}",
        single=spec.single_output,
    )
    node = result.node if spec.single_output else result[0].node.args[0]
    node.meta["calls"] = tuple(calls)
    return result


def try_locally(
    fn: Callable[..., Any],
    table: Mapping[str, Axes],
    sizes: Mapping[str, int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[list[Tensor], list[BodyCall]]:
    """Run `fn(comm, ...)` forward and backward on meta tensors of local shapes.

    Args:
        fn: a body, or an op that takes a comm.
        table: the comm's axes.
        sizes: mesh axis -> size.
        args, kwargs: of the call; typed tensors in them become local meta tensors.

    Returns:
        The outputs, and the collectives that every rank will call.
    """
    comm = ShapeComm(dict(sizes), dict.fromkeys(sizes, 0))
    local = map_structure(lambda x: _local(x, sizes) if isinstance(x, TypedTensor) else x, args)
    with torch.device("meta"):
        out = fn(BodyComm(comm, table), *local, **kwargs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        roots = [y for y in outs if y.requires_grad]
        comm.phase = "backward"
        if roots:
            torch.autograd.backward(roots, [torch.empty_like(y) for y in roots])
    return outs, comm.calls


def _local(x: TypedTensor, sizes: Mapping[str, int]) -> Tensor:
    plain = torch.empty(x.type_.local_shape(sizes), dtype=x.type_.dtype, device="meta")
    return plain.as_subclass(_Local).requires_grad_(x.type_.grad)


def _check_operands(
    tracer: "Tracer", spec: LocalMap, operands: Sequence[TypedTensor], place: str
) -> list[str]:
    """Check the operands against in_axes; return the mesh axes on which something varies."""
    for i, (x, axes) in enumerate(zip(operands, spec.in_axes, strict=True)):
        names = axis_names(axes, place)
        if len(names) != x.dim():
            raise ShardingError(
                f"{place}: operand {i} ({x.type_}) is declared {axes!r}. Give one name per dim."
            )
        for name, size in zip(names, x.type_.shape, strict=True):
            tracer.bind(name, size, place)
        want = tracer.layout.spec(names, x.type_.shape, place)
        if want != x.type_.spec:
            raise ShardingError(
                f"{place}: operand {i} is {x.type_}, declared {axes!r} = {want}. "
                f"shard(x, {axes!r}) it first."
            )
        if x.type_.permuted != tracer.layout.permuted(names):
            raise ShardingError(
                f"{place}: operand {i} is {x.type_}, declared {axes!r}, which has another order. "
                f"shard(x, {axes!r}) it first."
            )
        if x.type_.permuted and not spec.any_order:
            name = names[x.type_.permuted[0]]
            raise ShardingError(
                f"{place}: operand {i} ({x.type_}) has axis {name!r} in zigzag order, and the body "
                "may look at its neighbours. Promise local_map(..., any_order=True), or "
                f"shard(x, ...) with an axis there that has no order."
            )
    named = [*spec.over]
    for out in spec.out_axes:
        named += [*out.partial, *out.replicated, *(n for n in out.axes.split() if n != "_")]
    over = {a for name in named for a in tracer.layout.axes(name)}
    touched = []
    for axis in tracer.mesh_sizes:
        states = [x.type_.state(axis) for x in operands]
        if P in states:
            i = states.index(P)
            raise ShardingError(
                f"{place}: operand {i} ({operands[i].type_}) is a pending sum over mesh axis "
                f"{axis!r}. Insert shard(x, ...) before the body."
            )
        if axis in over or S in states or R in states:
            touched.append(axis)
    return touched


def _try_body(
    tracer: "Tracer",
    spec: LocalMap,
    table: dict[str, Axes],
    operands: Sequence[TypedTensor],
    place: str,
) -> tuple[list[Tensor], list[BodyCall]]:
    """Run the body once at local shapes, to learn its outputs and collectives."""
    tracer.open = False  # a typed tensor that the body closes over is used outside its trace
    try:
        outs, calls = try_locally(spec.fn, table, tracer.mesh_sizes, tuple(operands), {})
    except ShardingError:
        raise
    except Exception as error:
        shapes = [list(x.type_.local_shape(tracer.mesh_sizes)) for x in operands]
        raise ShardingError(
            f"{place}: the body failed at local shapes {shapes}: {str(error).rstrip('.')}. "
            "Fix the body, or declare static=False if its shapes depend on data."
        ) from error
    finally:
        tracer.open = True
    if len(outs) != len(spec.out_axes):
        raise ShardingError(
            f"{place}: the body returns {len(outs)} values, out_axes declares "
            f"{len(spec.out_axes)}. Declare one per output."
        )
    return outs, calls


def _output_type(
    tracer: "Tracer",
    spec: LocalMap,
    out: Out,
    number: int,
    operands: Sequence[TypedTensor],
    touched: Sequence[str],
    locals_: list[Tensor] | None,
    place: str,
) -> ShardType:
    names = axis_names(out.axes, place)
    cut_by = tuple(tracer.layout.axes(name) for name in names)
    cuts = [math.prod(tracer.mesh_sizes[a] for a in axes) for axes in cut_by]
    dtype = operands[0].type_.dtype
    if locals_ is not None:
        local = locals_[number]
        if local.dim() != len(names):
            raise ShardingError(
                f"{place}: output {number} is declared {out.axes!r}, the body returns "
                f"{list(local.shape)}. Give one name per dim."
            )
        shape = tuple(n * c for n, c in zip(local.shape, cuts, strict=True))
        dtype = local.dtype
        for name, size in zip(names, shape, strict=True):
            tracer.bind(name, size, f"{place}, output {number}")
    else:
        unknown = [name for name in names if name not in tracer.bound]
        if unknown:
            raise ShardingError(
                f"{place}: output {number} has axes {unknown} of unknown size. With static=False "
                "name output dims by axes of the operands."
            )
        shape = tuple(tracer.bound[name][0] for name in names)
    kinds: dict[str, str] = {}
    for state, axes in ((P, out.partial), (R, out.replicated)):
        kinds.update({a: state for name in axes for a in tracer.layout.axes(name)})
    used = {a for axes in cut_by for a in axes}
    if both := [a for a in kinds if a in used]:
        raise ShardingError(
            f"{place}: output {number} ({out.axes!r}) is cut over mesh axis {both[0]!r}, and "
            f"declared partial or replicated over it. Map {' '.join(out.partial + out.replicated)} "
            "and the output's dims to different mesh axes in rules, or name one of the two."
        )
    silent = [a for a in touched if a not in used and a not in kinds]
    if silent:
        advice = spec.advice or (
            "Name the logical axis in the output's dims, in Out(partial=...) or in "
            "Out(replicated=...)."
        )
        raise ShardingError(
            f"{place}: output {number} ({out.axes!r}) does not say what it is over mesh axis "
            f"{silent[0]!r}, on which an input or another output varies. {advice}"
        )
    grad = out.grad and dtype.is_floating_point and any(x.type_.grad for x in operands)
    permuted = tracer.layout.permuted(names)
    return make_type(
        shape, dtype, cut_by, tracer.mesh_sizes, kinds=kinds, grad=grad, permuted=permuted
    )
