"""Collectives as a value: what one rank may ask of the others, raw and differentiable."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatree.parallel.order import Ranges, natural_ranges
from megatree.parallel.transitions import Step, plan_move
from megatree.parallel.types import ShardType

Axes = tuple[str, ...]


class RankComm:
    """One rank's view of the mesh; every driver (gloo, NCCL, simulator) implements the raw methods.

    Raw collectives take and return local tensors and record no gradient. A tuple of axes is one
    flattened axis, outer to inner, in the order of the tuple.
    """

    sizes: Mapping[str, int]
    coords: Mapping[str, int]
    device: Any  # torch.device, which type checkers take for a descriptor
    plans: bool = False  # whether it moves shapes alone

    def at(self, source: str) -> "RankComm":
        """Return the comm for calls of a line of the user's program, see `runtime.recorded`."""
        return self

    def size(self, axes: Axes) -> int:
        n = 1
        for axis in axes:
            n *= self.sizes[axis]
        return n

    def index(self, axes: Axes) -> int:
        i = 0
        for axis in axes:
            i = i * self.sizes[axis] + self.coords[axis]
        return i

    def prepare(self, axes_list: Iterable[Axes]) -> None:
        """Set up the groups of these tuples of axes; every rank calls it alike."""

    def psum(self, x: Tensor, axes: Axes) -> Tensor:
        raise NotImplementedError

    def pmax(self, x: Tensor, axes: Axes) -> Tensor:
        raise NotImplementedError

    def all_gather(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        raise NotImplementedError

    def psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        raise NotImplementedError

    def all_to_all(self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int) -> Tensor:
        raise NotImplementedError

    def all_to_all_v(self, x: Tensor, axes: Axes, send: list[int], recv: list[int]) -> Tensor:
        raise NotImplementedError

    def ppermute(self, x: Tensor, axes: Axes, shift: int) -> Tensor:
        raise NotImplementedError

    def ppermute_async(self, x: Tensor, axes: Axes, shift: int) -> Callable[[], Tensor]:
        """Start `ppermute`; `x` may not be written before the returned function has waited."""
        y = self.ppermute(x, axes, shift)
        return lambda: y

    def all_to_all_async(
        self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int
    ) -> Callable[[], Tensor]:
        """Start `all_to_all`; `x` may not be written before the returned function has waited."""
        y = self.all_to_all(x, axes, split_dim, concat_dim)
        return lambda: y

    def all_to_all_v_async(
        self, x: Tensor, axes: Axes, send: list[int], recv: list[int]
    ) -> Callable[[], Tensor]:
        """Start `all_to_all_v`; `x` may not be written before the returned function has waited."""
        y = self.all_to_all_v(x, axes, send, recv)
        return lambda: y

    def prepare_members(self, axis: str, members: tuple[int, ...]) -> None:
        """Set up the group of some coordinates of one axis; every rank calls it alike."""

    def psum_members(self, x: Tensor, axis: str, members: tuple[int, ...]) -> Tensor:
        """Sum over some coordinates of one axis; only those call it."""
        raise NotImplementedError

    def send_async(self, x: Tensor, axis: str, to: int) -> Callable[[], None]:
        """Start sending to coordinate `to` of an axis; the returned function waits.

        Messages between two ranks arrive in the order in which both post them.
        """
        raise NotImplementedError

    def recv_async(
        self, shape: tuple[int, ...], dtype: torch.dtype, axis: str, source: int
    ) -> Callable[[], Tensor]:
        """Start receiving from coordinate `source` of an axis; the returned function waits."""
        raise NotImplementedError

    def psum_async(self, x: Tensor, axes: Axes) -> Callable[[], None]:
        """Start summing `x` in place; the returned function waits for the result."""
        x.copy_(self.psum(x, axes))
        return lambda: None

    def psum_scatter_async(self, x: Tensor, axes: Axes) -> Callable[[], Tensor]:
        """Start `psum_scatter` along dim 0; the returned function waits for this rank's piece."""
        piece = self.psum_scatter(x, axes, 0)
        return lambda: piece

    def all_gather_async(self, x: Tensor, axes: Axes) -> Callable[[], Tensor]:
        """Start `all_gather` along dim 0; the returned function waits for the whole."""
        whole = self.all_gather(x, axes, 0)
        return lambda: whole


class OneDevice(RankComm):
    """A mesh of one rank: no axis, no collective."""

    sizes: Mapping[str, int] = {}
    coords: Mapping[str, int] = {}

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)


def psum(comm: RankComm, x: Tensor, axes: Axes) -> Tensor:
    """Sum over the ranks of the axes."""
    return comm.psum(x, axes)


def all_gather(comm: RankComm, x: Tensor, axes: Axes, dim: int) -> Tensor:
    """Join the ranks' pieces along a dim."""
    return comm.all_gather(x, axes, dim)


def psum_scatter(comm: RankComm, x: Tensor, axes: Axes, dim: int) -> Tensor:
    """Sum, and keep this rank's piece along a dim."""
    return comm.psum_scatter(x, axes, dim)


def all_to_all(comm: RankComm, x: Tensor, axes: Axes, split_dim: int, concat_dim: int) -> Tensor:
    """Cut along one dim, exchange, join along another."""
    return comm.all_to_all(x, axes, split_dim, concat_dim)


def all_to_all_v(comm: RankComm, x: Tensor, axes: Axes, send: list[int], recv: list[int]) -> Tensor:
    """Exchange rows in unequal numbers."""
    return comm.all_to_all_v(x, axes, send, recv)


def ppermute(comm: RankComm, x: Tensor, axes: Axes, shift: int) -> Tensor:
    """Hand to the rank `shift` places on."""
    return comm.ppermute(x, axes, shift)


Dual = Callable[..., tuple[Callable[..., Tensor], tuple[Any, ...]]]

DUALS: dict[Callable[..., Tensor], Dual] = {
    psum: lambda: (psum, ()),
    all_gather: lambda dim: (psum_scatter, (dim,)),
    psum_scatter: lambda dim: (all_gather, (dim,)),
    all_to_all: lambda split, concat: (all_to_all, (concat, split)),
    all_to_all_v: lambda send, recv: (all_to_all_v, (recv, send)),
    ppermute: lambda shift: (ppermute, (-shift,)),
}
"""Collective -> its adjoint inside a body, where no value is invariant."""


class _Collective(torch.autograd.Function):
    """A raw collective whose backward is its dual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: RankComm, fn: Any, axes: Axes, args: Any) -> Tensor:
        ctx.call = comm, fn, axes, args
        y = fn(comm, x, axes, *args)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        comm, fn, axes, args = ctx.call
        (g,) = grads
        dual, dual_args = DUALS[fn](*args)
        return dual(comm, g.contiguous(), axes, *dual_args), None, None, None, None


def all_to_all_async(
    comm: RankComm, x: Tensor, axes: Axes, split_dim: int, concat_dim: int
) -> Callable[[], Tensor]:
    """Start `all_to_all`."""
    return comm.all_to_all_async(x, axes, split_dim, concat_dim)


def all_to_all_v_async(
    comm: RankComm, x: Tensor, axes: Axes, send: list[int], recv: list[int]
) -> Callable[[], Tensor]:
    """Start `all_to_all_v`."""
    return comm.all_to_all_v_async(x, axes, send, recv)


STARTS: dict[Callable[..., Tensor], Callable[..., Callable[[], Tensor]]] = {
    all_to_all: all_to_all_async,
    all_to_all_v: all_to_all_v_async,
}
"""Collective -> what starts it."""


class _Flight:
    """A collective on its way, and later its gradient on the way back."""

    def __init__(self, comm: RankComm, fn: Callable[..., Tensor], axes: Axes, args: Any) -> None:
        self.comm, self.fn, self.axes, self.args = comm, fn, axes, args
        self.wait: Callable[[], Tensor] | None = None

    def leave(self, x: Tensor) -> None:
        self.wait = STARTS[self.fn](self.comm, x.contiguous(), self.axes, *self.args)

    def leave_back(self, g: Tensor) -> None:
        dual, args = DUALS[self.fn](*self.args)
        self.wait = STARTS[dual](self.comm, g.contiguous(), self.axes, *args)

    def arrive(self) -> Tensor:
        assert self.wait is not None, "nothing is on its way"
        wait, self.wait = self.wait, None
        return wait()


class _Leave(torch.autograd.Function):
    """The start of a flight; returns a token without memory. Its backward waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, ctx.shape = flight, x.shape
        flight.leave(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.flight.arrive().view(ctx.shape), None


class _Arrive(torch.autograd.Function):
    """The end of a flight. Its backward starts the way back."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        ctx.flight.leave_back(g)
        return g.new_zeros(()), None


class BodyComm:
    """What a body or an op receives: differentiable collectives over its own axis names."""

    def __init__(self, comm: RankComm, table: Mapping[str, Axes]) -> None:
        self.comm, self.table = comm, table
        self.chunks: Mapping[str, int] = getattr(table, "chunks", {})

    def axes(self, axis: str) -> Axes:
        try:
            return self.table[axis]
        except KeyError:
            raise ValueError(
                f"comm: {axis!r} is not an axis of this body (it has {', '.join(self.table)}). "
                "Name it in in_axes, out_axes or over."
            ) from None

    @property
    def plans(self) -> bool:
        return self.comm.plans

    def axis_size(self, axis: str) -> int:
        return self.comm.size(self.axes(axis))

    def axis_index(self, axis: str) -> int:
        return self.comm.index(self.axes(axis))

    def ranges(self, axis: str, length: int, index: int | None = None) -> Ranges:
        at = self.axis_index(axis) if index is None else index
        size, chunks = length * self.axis_size(axis), self.chunks.get(axis, 1)
        return natural_ranges(size, chunks, at * length, (at + 1) * length)

    def _run(self, fn: Callable[..., Tensor], x: Tensor, axis: str, *args: Any) -> Tensor:
        axes = self.axes(axis)
        if not axes:
            return x
        if x.is_floating_point():
            return _Collective.apply(x.contiguous(), self.comm, fn, axes, args)
        return fn(self.comm, x.contiguous(), axes, *args)

    def psum(self, x: Tensor, axis: str) -> Tensor:
        return self._run(psum, x, axis)

    def pmax(self, x: Tensor, axis: str) -> Tensor:
        axes = self.axes(axis)
        return self.comm.pmax(x.detach().contiguous(), axes) if axes else x.detach()

    def all_gather(self, x: Tensor, axis: str, dim: int) -> Tensor:
        return self._run(all_gather, x, axis, dim)

    def psum_scatter(self, x: Tensor, axis: str, dim: int) -> Tensor:
        return self._run(psum_scatter, x, axis, dim)

    def all_to_all(self, x: Tensor, axis: str, split_dim: int, concat_dim: int) -> Tensor:
        return self._run(all_to_all, x, axis, split_dim, concat_dim)

    def all_to_all_v(
        self, x: Tensor, axis: str, send: Sequence[int], recv: Sequence[int]
    ) -> Tensor:
        return self._run(all_to_all_v, x, axis, list(send), list(recv))

    def _start(
        self, fn: Callable[..., Tensor], x: Tensor, axis: str, *args: Any
    ) -> Callable[[], Tensor]:
        axes = self.axes(axis)
        if not axes:
            return lambda: x
        flight = _Flight(self.comm, fn, axes, args)
        token = _Leave.apply(x, flight)
        return lambda: _Arrive.apply(token, flight)

    def all_to_all_async(
        self, x: Tensor, axis: str, split_dim: int, concat_dim: int
    ) -> Callable[[], Tensor]:
        return self._start(all_to_all, x, axis, split_dim, concat_dim)

    def all_to_all_v_async(
        self, x: Tensor, axis: str, send: Sequence[int], recv: Sequence[int]
    ) -> Callable[[], Tensor]:
        return self._start(all_to_all_v, x, axis, list(send), list(recv))

    def ppermute(self, x: Tensor, axis: str, shift: int) -> Tensor:
        return self._run(ppermute, x, axis, shift)

    def ppermute_async(self, x: Tensor, axis: str, shift: int) -> Callable[[], Tensor]:
        axes = self.axes(axis)
        if not axes:
            return lambda: x
        return self.comm.ppermute_async(x.detach().contiguous(), axes, shift)


def run_steps(comm: RankComm, x: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """Execute the steps of a transition on a local tensor, without gradient."""
    for step in steps:
        axes, dim = step.axes, step.dim
        if step.kind == "all_gather":
            x = comm.all_gather(x.contiguous(), axes, dim)
        elif step.kind == "psum_scatter":
            x = comm.psum_scatter(x.contiguous(), axes, dim)
        elif step.kind == "psum":
            x = comm.psum(x.contiguous(), axes)
        elif step.kind == "all_to_all":
            x = comm.all_to_all(x.contiguous(), axes, step.to_dim, dim)
        elif step.kind == "slice":
            x = x.chunk(comm.size(axes), dim)[comm.index(axes)].contiguous()
        elif step.kind == "pad":
            n, i = comm.size(axes), comm.index(axes)
            x = torch.cat([x if j == i else torch.zeros_like(x) for j in range(n)], dim)
        elif comm.index(axes) != 0:  # mask
            x = torch.zeros_like(x)
    return x


class Transition(torch.autograd.Function):
    """`move` on local tensors: planned steps forward, the steps of the dual backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: RankComm, steps: tuple[Step, ...], dual: tuple[Step, ...]
    ) -> Tensor:
        ctx.call = comm, dual
        y = run_steps(comm, x, steps)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        comm, dual = ctx.call
        return run_steps(comm, grads[0], dual), None, None, None


def move(comm: RankComm, x: Tensor, src: ShardType, dst: ShardType) -> Tensor:
    """Turn a local tensor of type `src` into one of type `dst`: the identity on the global value.

    Its backward is `move(g, dst.dual, src.dual)`.
    """
    return Transition.apply(x, comm, plan_move(src, dst), plan_move(dst.dual, src.dual))
