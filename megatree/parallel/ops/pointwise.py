"""Rules of pointwise functions: every dim is free; they differ in what they are linear in."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatree.functional.signature import Signature
from megatree.parallel.errors import ShardingError
from megatree.parallel.ops.rule import Rule, argument, plain_call, table
from megatree.parallel.sources import user_line
from megatree.parallel.typed import TypedTensor, typed_leaves
from megatree.parallel.types import make_type

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer

Linear = Callable[[tuple[Any, ...], list[TypedTensor]], list[list[int]]]


def _nothing(args: tuple[Any, ...], operands: list[TypedTensor]) -> list[list[int]]:
    return []


def _first(args: tuple[Any, ...], operands: list[TypedTensor]) -> list[list[int]]:
    return [[0]] if args and isinstance(args[0], TypedTensor) else []


def _each(args: tuple[Any, ...], operands: list[TypedTensor]) -> list[list[int]]:
    return [[i] for i in range(len(operands))]


def _jointly(args: tuple[Any, ...], operands: list[TypedTensor]) -> list[list[int]]:
    """A sum: pending sums may be added to pending sums only, never to a number other than 0."""
    if any(not isinstance(a, TypedTensor) and a != 0 for a in args[:2]):
        return []
    return [list(range(len(operands)))]


def _where(args: tuple[Any, ...], operands: list[TypedTensor]) -> list[list[int]]:
    """A choice: both values pending, or one and the other 0."""
    if any(not isinstance(a, TypedTensor) and a != 0 for a in args[1:]):
        return []
    return [list(range(1, len(operands)))]


def _masked_fill(args: tuple[Any, ...], operands: list[TypedTensor]) -> list[list[int]]:
    fill = args[2] if len(args) > 2 else None
    return [[0]] if isinstance(fill, int | float) and fill == 0 else []


def broadcast_labels(operands: list[TypedTensor]) -> tuple[list[list[str | None]], list[str]]:
    """Label dims from the right; a dim of size 1 that is stretched has no label."""
    shape = torch.broadcast_shapes(*(x.type_.shape for x in operands))
    labels = []
    for x in operands:
        skip = len(shape) - x.dim()
        labels.append(
            [str(skip + d) if n == shape[skip + d] else None for d, n in enumerate(x.type_.shape)]
        )
    return labels, [str(d) for d in range(len(shape))]


def pointwise(
    tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any, *, linear: Linear
) -> Any:
    """Type a function whose output has the broadcast shape of its operands."""
    operands = typed_leaves((args, kwargs))
    ins, out = broadcast_labels(operands)
    values = (*args, *(kwargs[k] for k in ("input", "other", "mask", "value") if k in kwargs))
    sig = Signature(
        operands=tuple(map(tuple, ins)),
        outputs=(tuple(out),),
        linear=tuple(map(frozenset, linear(values, operands))),
    )
    return tracer.operation(name, func, args, kwargs, sig)


def divide(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a quotient: linear in the numerator unless it is rounded."""
    linear = _first if kwargs.get("rounding_mode") is None else _nothing
    return pointwise(tracer, name, func, args, kwargs, linear=linear)


def where(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a choice between two values."""
    if func is Tensor.where:  # x.where(condition, y) is torch.where(condition, x, y)
        args = (argument(args, kwargs, 1, "condition"), args[0], *args[2:])
    elif "condition" in kwargs:
        args = (kwargs["condition"], *args)
    kwargs = {key: value for key, value in kwargs.items() if key != "condition"}
    if len(args) + len(kwargs) < 3:
        raise ShardingError(
            f"{user_line()}: where(condition): the result's shape depends on data. "
            "Give both values, or use a local_map."
        )
    return pointwise(tracer, name, torch.where, args, kwargs, linear=_where)


def convert(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type a cast; a pending sum may not be rounded to integers."""
    x, meta = args[0], plain_call(func, args, kwargs)
    if not isinstance(meta, Tensor):
        return meta  # x.type(), a name
    dtype = meta.dtype
    rounds = x.dtype.is_floating_point and not dtype.is_floating_point
    linear = _nothing if rounds or dtype == torch.bool else _first
    return pointwise(tracer, name, Tensor.to, (x, dtype), {}, linear=linear)


def like(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type zeros_like and such: laid out like the operand, the same on all other axes."""
    x = args[0]
    meta = plain_call(func, args, kwargs)
    ty = make_type(
        tuple(meta.shape),
        meta.dtype,
        x.type_.spec,
        tracer.mesh_sizes,
        permuted=x.type_.permuted,
    )
    return tracer.emit(func, args, kwargs, [ty], [meta], op=name)


def detach(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type detach: the same value without a gradient, so R becomes I."""
    x = args[0]
    ty = make_type(
        x.type_.shape,
        x.type_.dtype,
        x.type_.spec,
        tracer.mesh_sizes,
        kinds=dict(x.type_.kinds),
        permuted=x.type_.permuted,
    )
    return tracer.emit(func, args, kwargs, [ty], [x.plain], op=name)


_NONLINEAR = [
    "abs",
    "acos",
    "asin",
    "atan",
    "atan2",
    "ceil",
    "clamp",
    "clamp_min",
    "clamp_max",
    "cos",
    "cosh",
    "elu",
    "eq",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "floor_divide",
    "floordiv",
    "fmod",
    "ge",
    "gelu",
    "gt",
    "hardtanh",
    "heaviside",
    "isfinite",
    "isinf",
    "isnan",
    "isneginf",
    "isposinf",
    "le",
    "leaky_relu",
    "log",
    "log10",
    "log1p",
    "log2",
    "logaddexp",
    "logical_and",
    "logical_or",
    "logical_not",
    "logical_xor",
    "logit",
    "logsigmoid",
    "lt",
    "maximum",
    "minimum",
    "mod",
    "ne",
    "nan_to_num",
    "pow",
    "reciprocal",
    "relu",
    "relu6",
    "remainder",
    "round",
    "rsqrt",
    "selu",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "sinh",
    "softplus",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "trunc",
    "xlogy",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "bitwise_not",
    "bitwise_left_shift",
    "bitwise_right_shift",
    "and",
    "or",
    "xor",
    "invert",
    "lshift",
    "rshift",
    "rpow",
    "rfloordiv",
    "rmod",
    "rdiv",
    "rtruediv",
    "rlshift",
    "rrshift",
    "ror",
    "rxor",
]
_MAPS = ["neg", "negative", "positive", "pos", "contiguous", "clone", "real"]
_CASTS = [
    "float",
    "double",
    "half",
    "bfloat16",
    "int",
    "long",
    "short",
    "bool",
    "to",
    "type",
    "type_as",
]

TABLE = {
    **table(_NONLINEAR, Rule(partial(pointwise, linear=_nothing))),
    **table(_MAPS, Rule(partial(pointwise, linear=_first))),
    **table(_CASTS, Rule(convert)),
    **table(["add", "sub", "subtract", "radd", "rsub"], Rule(partial(pointwise, linear=_jointly))),
    **table(["mul", "multiply", "rmul"], Rule(partial(pointwise, linear=_each))),
    **table(["div", "divide", "true_divide", "truediv"], Rule(divide)),
    **table(["where"], Rule(where)),
    **table(["masked_fill"], Rule(partial(pointwise, linear=_masked_fill))),
    **table(["zeros_like", "ones_like", "full_like"], Rule(like)),
    **table(["detach"], Rule(detach)),
    Tensor.__rand__: Rule(partial(pointwise, linear=_nothing)),  # not torch.rand
}
