"""Collectives that say what they are while they run: a comm that notes every call of a rank."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatree.io.world import World
from megatree.parallel.comm import Axes, RankComm

_KEPT = 64
"""Calls of the past that a rank remembers: how far back a skipped call is found."""


class Call(NamedTuple):
    """One call of a rank; noted in about a microsecond, and spelt out only when somebody asks.

    Args:
        kind: "psum", "recv", "gather" and such.
        over: who makes it together: mesh axes ("dp.tp"), or a channel ("pp 0>1").
        number: how many calls over the same this rank has made, this one included.
        operand: dtype and local shape; None where there is none.
        source: line of the user's program, or the code and line of the runtime that called.
        phase: "forward" or "backward" inside a program, "" elsewhere.
    """

    kind: str
    over: str
    number: int
    operand: tuple[torch.dtype, tuple[int, ...]] | None
    source: str | tuple[Any, int]
    phase: str

    @property
    def _rest(self) -> str:
        source = self.source
        place = source if isinstance(source, str) else _place(*source)
        return f"{f', {self.phase}' if self.phase else ''}, at {place}"

    @property
    def _operand(self) -> str:
        if self.operand is None:
            return ""
        dtype, shape = self.operand
        return f" of {str(dtype)[6:]} {list(shape)}"

    @property
    def label(self) -> str:
        """What has to be the same on all ranks that make the call together."""
        kind = "message" if self.kind in ("send", "recv") else self.kind
        return f"{kind}{self._operand}{self._rest}"

    def __str__(self) -> str:
        return f"{self.kind}({self.over}){self._operand}, call {self.number}{self._rest}"


class Recorder:
    """What one rank waits in, and what it has called; a watchdog's thread reads it.

    Args:
        device: of the rank. On a GPU a call is over when the GPU has passed it, not when the host
            has.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.main = threading.get_ident()
        self.device = torch.device(device)
        self.counts: dict[str, int] = {}
        self.recent: dict[str, deque[Call]] = {}
        self.watched = False
        """Whether somebody calls `waiting` now and then, and so empties what a GPU has passed."""
        self._found: list[tuple[int, str]] | None = None
        self._serial = 0
        self._now: tuple[Call, float] | None = None
        self._on_device: deque[tuple[Call, torch.cuda.Event]] = deque()
        self._head_since = 0.0

    def begin(
        self, kind: str, over: str, x: Tensor | None, source: str | tuple[Any, int], phase: str
    ) -> Call:
        """Note a call that starts."""
        number = self.counts.get(over, 0) + 1
        if number == 1:
            self.recent[over] = deque(maxlen=_KEPT)
        self.counts[over] = number
        operand = None if x is None else (x.dtype, x.shape)
        call = Call(kind, over, number, operand, source, phase)
        self.recent[over].append(call)
        if self._found is not None and x is not None:
            self._inspect(call, x)
        return call

    def _inspect(self, call: Call, x: Tensor) -> None:
        assert self._found is not None
        self._serial += 1
        if not self._found and not x.is_meta and x.is_floating_point() and not x.isfinite().all():
            self._found.append((self._serial, str(call)))

    @contextmanager
    def inspecting(self) -> Generator[list[tuple[int, str]]]:
        """Search the operands of calls for values that are not finite.

        Yields:
            A list for the first call that such an operand went into: its number among all calls in
            this context, and what it is. It stays empty if there is none.
        """
        self._serial, self._found = 0, []
        try:
            yield self._found
        finally:
            self._found = None

    def wait(self, call: Call, fn: Callable[..., Any], *args: Any) -> Any:
        """Run the part of a call that waits for others."""
        before, self._now = self._now, (call, time.monotonic())
        try:
            return fn(*args)
        finally:
            self._now = None if before is None else (before[0], time.monotonic())
            if self.watched and self.device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
                if not self._on_device:
                    self._head_since = time.monotonic()
                self._on_device.append((call, event))

    def alone(self, what: str, fn: Callable[..., Any], *args: Any) -> Any:
        """Run what makes calls of its own, of which those that torch has compiled are not noted.

        A rank that neither ends it nor makes a noted call for too long waits as well.
        """
        return self.wait(self.begin(what, "alone", None, _caller(1), ""), fn, *args)

    def waiting(self) -> tuple[Call, float] | None:
        """Return the call that this rank waits in, and for how many seconds."""
        while self._on_device and self._on_device[0][1].query():
            self._on_device.popleft()
            self._head_since = time.monotonic()
        if self._on_device:
            return self._on_device[0][0], time.monotonic() - self._head_since
        if (now := self._now) is None:
            return None
        return now[0], time.monotonic() - now[1]

    def stack(self, most: int = 5) -> list[str]:
        """Return where the rank's own thread is in Python, innermost first."""
        frame = sys._current_frames().get(self.main)
        lines = []
        while frame is not None and len(lines) < most:
            code = frame.f_code
            if code.co_name.startswith("_bootstrap"):
                break
            lines.append(f"{_place(code, frame.f_lineno)} {code.co_name}")
            frame = frame.f_back
        return lines


def _place(code: Any, line: int) -> str:
    return f"{'/'.join(code.co_filename.split('/')[-2:])}:{line}"


def _caller(depth: int) -> tuple[Any, int]:
    """Return the code and line of a frame, seen from who calls this."""
    frame = sys._getframe(depth + 1)
    return frame.f_code, frame.f_lineno


class RecordedComm(RankComm):
    """A comm whose calls a recorder notes.

    Inside a function that torch.compile traces, it is the comm it wraps: what is compiled has no
    place for notes.

    Args:
        comm: does the work.
        recorder: of this rank.
        source: line of the user's program that calls; "" for calls of the runtime.
    """

    def __init__(self, comm: RankComm, recorder: Recorder, source: str = "") -> None:
        self.comm, self.recorder, self.source = comm, recorder, source
        self.sizes, self.coords, self.device = comm.sizes, comm.coords, comm.device

    def at(self, source: str) -> RankComm:
        return RecordedComm(self.comm, self.recorder, source)

    def _begin(self, kind: str, over: str, x: Tensor | None, depth: int = 2) -> Call:
        if not self.source:
            return self.recorder.begin(kind, over, x, _caller(depth), "")
        phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        return self.recorder.begin(kind, over, x, self.source, phase)

    def _message(self, kind: str, over: str, x: Tensor) -> Call:
        return self.recorder.begin(kind, over, x, self.source or _caller(2), "")

    def _call(self, kind: str, x: Tensor, axes: Axes, fn: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(x, axes, *args)
        return self.recorder.wait(self._begin(kind, ".".join(axes), x, 3), fn, x, axes, *args)

    def _start(self, kind: str, x: Tensor, axes: Axes, fn: Callable[..., Any], *args: Any) -> Any:
        """Start a call; what the returned function waits in is the same call."""
        if torch.compiler.is_compiling():
            return fn(x, axes, *args)
        call = self._begin(kind, ".".join(axes), x, 3)
        wait = self.recorder.wait(call, fn, x, axes, *args)
        return lambda: self.recorder.wait(call, wait)

    def prepare(self, axes_list: Iterable[Axes]) -> None:
        call = self._begin("prepare groups", "all ranks", None)
        self.recorder.wait(call, self.comm.prepare, axes_list)

    def psum(self, x: Tensor, axes: Axes) -> Tensor:
        return self._call("psum", x, axes, self.comm.psum)

    def pmax(self, x: Tensor, axes: Axes) -> Tensor:
        return self._call("pmax", x, axes, self.comm.pmax)

    def all_gather(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        return self._call("all_gather", x, axes, self.comm.all_gather, dim)

    def psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        return self._call("psum_scatter", x, axes, self.comm.psum_scatter, dim)

    def all_to_all(self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int) -> Tensor:
        return self._call("all_to_all", x, axes, self.comm.all_to_all, split_dim, concat_dim)

    def all_to_all_v(self, x: Tensor, axes: Axes, send: list[int], recv: list[int]) -> Tensor:
        return self._call("all_to_all_v", x, axes, self.comm.all_to_all_v, send, recv)

    def all_to_all_async(
        self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int
    ) -> Callable[[], Tensor]:
        return self._start("all_to_all", x, axes, self.comm.all_to_all_async, split_dim, concat_dim)

    def all_to_all_v_async(
        self, x: Tensor, axes: Axes, send: list[int], recv: list[int]
    ) -> Callable[[], Tensor]:
        return self._start("all_to_all_v", x, axes, self.comm.all_to_all_v_async, send, recv)

    def ppermute(self, x: Tensor, axes: Axes, shift: int) -> Tensor:
        return self._call("ppermute", x, axes, self.comm.ppermute, shift)

    def ppermute_async(self, x: Tensor, axes: Axes, shift: int) -> Callable[[], Tensor]:
        return self._start("ppermute", x, axes, self.comm.ppermute_async, shift)

    def psum_async(self, x: Tensor, axes: Axes) -> Callable[[], None]:
        return self._start("psum", x, axes, self.comm.psum_async)

    def psum_scatter_async(self, x: Tensor, axes: Axes) -> Callable[[], Tensor]:
        return self._start("psum_scatter", x, axes, self.comm.psum_scatter_async)

    def all_gather_async(self, x: Tensor, axes: Axes) -> Callable[[], Tensor]:
        return self._start("all_gather", x, axes, self.comm.all_gather_async)

    def prepare_members(self, axis: str, members: tuple[int, ...]) -> None:
        call = self._begin("prepare groups", "all ranks", None)
        self.recorder.wait(call, self.comm.prepare_members, axis, members)

    def psum_members(self, x: Tensor, axis: str, members: tuple[int, ...]) -> Tensor:
        call = self._begin("psum", f"{axis} {' '.join(map(str, members))}", x)
        return self.recorder.wait(call, self.comm.psum_members, x, axis, members)

    def send_async(self, x: Tensor, axis: str, to: int) -> Callable[[], None]:
        call = self._message("send", f"{axis} {self.coords[axis]}>{to}", x)
        wait = self.recorder.wait(call, self.comm.send_async, x, axis, to)
        return lambda: self.recorder.wait(call, wait)

    def recv_async(
        self, shape: tuple[int, ...], dtype: torch.dtype, axis: str, source: int
    ) -> Callable[[], Tensor]:
        blank = torch.empty(shape, dtype=dtype, device="meta")
        call = self._message("recv", f"{axis} {source}>{self.coords[axis]}", blank)
        wait = self.recorder.wait(call, self.comm.recv_async, shape, dtype, axis, source)
        return lambda: self.recorder.wait(call, wait)


def recorded_world(world: World, recorder: Recorder) -> World:
    """Return a world whose meetings a recorder notes."""

    def noted(kind: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def meet(*args: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename.endswith("io/world.py"):
                frame = frame.f_back
            source = frame.f_code, frame.f_lineno
            call = recorder.begin(kind, "all ranks", None, source, "")
            return recorder.wait(call, fn, *args)

        return meet

    return replace(
        world,
        barrier=noted("barrier", world.barrier),
        gather=noted("gather", world.gather),
        broadcast=noted("broadcast", world.broadcast),
    )
