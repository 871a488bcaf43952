"""Rules of pointwise functions: every dim is free; they differ in what they are linear in."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatree.functional.signature import Signature
from megatree.parallel.ops.rule import Rule, table
from megatree.parallel.typed import TypedTensor, map_structure, typed_leaves
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
    if any(isinstance(a, int | float) and a != 0 for a in args[:2]):
        return []
    return [list(range(len(operands)))]


def _where(args: tuple[Any, ...], operands: list[TypedTensor]) -> list[list[int]]:
    values = args[1:]
    if any(not isinstance(a, TypedTensor) and a != 0 for a in values):
        return []
    first = sum(isinstance(a, TypedTensor) for a in args[:1])
    return [list(range(first, len(operands)))]


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
    sig = Signature(
        operands=tuple(map(tuple, ins)),
        outputs=(tuple(out),),
        linear=tuple(map(frozenset, linear(args, operands))),
    )
    return tracer.operation(name, func, args, kwargs, sig)


def like(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type zeros_like and such: laid out like the operand, the same on all other axes."""
    (x,) = typed_leaves((args, kwargs))
    plain_args, plain_kwargs = map_structure(
        lambda a: a.plain if isinstance(a, TypedTensor) else a, (args, kwargs)
    )
    meta = func(*plain_args, **plain_kwargs)
    ty = make_type(tuple(meta.shape), meta.dtype, x.type_.spec, tracer.mesh_sizes)
    return tracer.emit(func, args, kwargs, [ty], [meta], op=name)


def detach(tracer: "Tracer", name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Type detach: the same value without a gradient, so R becomes I."""
    x = args[0]
    ty = make_type(
        x.type_.shape, x.type_.dtype, x.type_.spec, tracer.mesh_sizes, kinds=dict(x.type_.kinds)
    )
    return tracer.emit(func, args, kwargs, [ty], [x.plain], op=name)


_NONLINEAR = """
abs acos asin atan atan2 ceil clamp clamp_min clamp_max cos cosh elu eq erf erfc exp exp2 expm1 floor
floor_divide floordiv fmod ge gelu gt hardtanh heaviside isfinite isinf isnan isneginf isposinf le
leaky_relu log log10 log1p log2 logaddexp logical_and logical_or logical_not logical_xor logit
logsigmoid lt maximum minimum mod ne nan_to_num pow reciprocal relu relu6 remainder round rsqrt
selu sigmoid sign silu sin sinh softplus sqrt square tan tanh trunc xlogy
bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift
and or xor invert lshift rshift rpow rfloordiv rmod rdiv rtruediv rlshift rrshift rand ror rxor
int long short bool
""".split()
_MAPS = "neg negative positive pos float double half bfloat16 to type type_as contiguous clone real".split()

TABLE = {
    **table(_NONLINEAR, Rule(partial(pointwise, linear=_nothing))),
    **table(_MAPS, Rule(partial(pointwise, linear=_first))),
    **table(["add", "sub", "subtract", "radd", "rsub"], Rule(partial(pointwise, linear=_jointly))),
    **table(["mul", "multiply", "rmul"], Rule(partial(pointwise, linear=_each))),
    **table(["div", "divide", "true_divide", "truediv"], Rule(partial(pointwise, linear=_first))),
    **table(["where"], Rule(partial(pointwise, linear=_where))),
    **table(["masked_fill"], Rule(partial(pointwise, linear=_masked_fill))),
    **table(["zeros_like", "ones_like", "full_like"], Rule(like)),
    **table(["detach"], Rule(detach)),
}
