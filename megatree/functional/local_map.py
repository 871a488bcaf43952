"""`local_map`: run ordinary Python on local shards inside a global-view function."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from megatree.functional.comm import SINGLE
from megatree.functional.param import axis_names


@dataclass(frozen=True)
class Out:
    """What an output of a body is on the mesh.

    Args:
        axes: one logical axis per dim ("_" for a dim that is whole).
        partial: logical axes over which the output is a pending sum.
        replicated: logical axes over which every rank holds the same value.
        grad: whether a gradient flows through this output.
    """

    axes: str
    partial: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    grad: bool = True

    def __post_init__(self) -> None:
        axis_names(self.axes, "Out")


@dataclass(frozen=True, kw_only=True)
class LocalMap:
    """A body with its declarations, as the type engine reads them."""

    fn: Callable[..., Any]
    in_axes: tuple[str, ...]
    out_axes: tuple[Out, ...]
    over: tuple[str, ...]
    reference: Callable[..., Any] | None
    static: bool
    single_output: bool
    any_order: bool = False
    flops: Callable[[Sequence[tuple[int, ...]]], int] | None = None
    advice: str = ""

    @property
    def name(self) -> str:
        """The name in plans and errors."""
        return getattr(self.fn, "__name__", "body")


def local_map(
    fn: Callable[..., Any],
    *,
    in_axes: Sequence[str],
    out_axes: str | Out | Sequence[str | Out],
    over: Sequence[str] = (),
    reference: Callable[..., Any] | None = None,
    static: bool = True,
    any_order: bool = False,
    flops: Callable[[Sequence[tuple[int, ...]]], int] | None = None,
    advice: str = "",
) -> Callable[..., Any]:
    """Wrap `fn(comm, *local)` so that it runs on local shards: the escape hatch and the research
    door.

    `comm` speaks logical axes (`comm.psum(x, "seq")`); on one device they are empty and the same
    body runs as it is. Inside a body there is no invariant type, so every collective has exactly
    one dual. A collective must run on every rank, in backward too: mask around one, never branch.

    Args:
        fn: the body; `comm` first, then local tensors.
        in_axes: per operand, one logical axis per dim; operands must already be laid out so.
        out_axes: per output, its axes, or an `Out` that also names partial and replicated axes. For
            every mesh axis on which an input varies (and every axis of `over`) each output must say
            sharded (in its dims), partial or replicated.
        over: logical axes over which the body communicates though no operand is cut by them.
        reference: the same function on whole tensors, for JAX and for the law test; None takes the
            body itself on one device.
        static: whether output shapes follow from input shapes; False for data-dependent bodies.
        any_order: promise that the body does not look at the order of elements along cut axes (no
            neighbours, no offsets), so that it may run on a sequence in zigzag order.
        flops: shapes of the operands, of one rank or of the whole mesh -> FLOPs of the products in
            a forward there, for plans; None counts none.
        advice: what a user of the body should do about rules under which an output would vary over
            an axis that it does not name; "" says what its author should.

    Returns:
        A function of the operands.

    Raises:
        ShardingError: (when lowered) an operand is laid out otherwise, or an output does not say
            what it is over an axis on which it varies.

    Reference: DESIGN section 3.
    """
    single = isinstance(out_axes, str | Out)
    outs = (out_axes,) if isinstance(out_axes, str | Out) else tuple(out_axes)
    spec = LocalMap(
        fn=fn,
        in_axes=tuple(in_axes),
        out_axes=tuple(o if isinstance(o, Out) else Out(o) for o in outs),
        over=tuple(over),
        reference=reference,
        static=static,
        single_output=single,
        any_order=any_order,
        flops=flops,
        advice=advice,
    )

    @functools.wraps(fn)
    def call(*operands: torch.Tensor) -> Any:
        if len(operands) != len(spec.in_axes):
            raise ValueError(
                f"local_map {spec.name}: {len(operands)} operands given, in_axes declares "
                f"{len(spec.in_axes)}. Declare one string of axes per operand."
            )
        if has_torch_function(operands):
            return handle_torch_function(call, operands, *operands)
        return fn(SINGLE, *operands)

    call.local_map = spec  # type: ignore[attr-defined]
    return call
