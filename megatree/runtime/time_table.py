"""Where the time of profiled steps went: from events to a table whose shares sum to one."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from megatree.runtime.op_kinds import (
    OPTIMIZER_MARK,
    OUTERMOST,
    WORK,
    Kind,
    kind_of_kernel,
    kind_of_op,
)

WINDOW = "megatree: profiled steps"
"""Range of the steps in a trace."""

_ROUNDING = 0.01
"""Microseconds by which times in a trace may be off: what ends so little after the next begins does
not hold it."""

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
_HOST = ("cpu_op", "user_annotation")


@dataclass(frozen=True, kw_only=True)
class Event:
    """A stretch of work.

    Args:
        kind: of work; None for one that only holds others.
        track: stream or thread.
        start, end: in microseconds.
        marks: whether it says what the work within it is, without being work itself.
    """

    kind: Kind | None
    track: Any
    start: float
    end: float
    marks: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """Time of one kind, per step.

    Args:
        kind: of work, or "idle".
        ms: milliseconds, each moment counted once.
        share: of the wall time.
        hidden_ms: further milliseconds of it while a kind that stands before it in `WORK` ran.
        ceiling_ms: what the step's work of this kind would take at the device's rates; None where
            that is not known.
    """

    kind: Kind
    ms: float
    share: float
    hidden_ms: float = 0.0
    ceiling_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class TimeTable:
    """Time by kind, the largest first.

    Args:
        num_steps: steps that it is the mean of.
        step_ms: wall time per step.
        rows: one per kind that took time or has a ceiling; their shares sum to 1.
    """

    num_steps: int
    step_ms: float
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return asdict(self)


def time_table(
    events: Iterable[Event],
    *,
    start: float,
    end: float,
    num_steps: int = 1,
    ceilings: Mapping[str, float] | None = None,
) -> TimeTable:
    """Add up the time of events by kind.

    Law: every moment of the window is counted once, as the first kind in `WORK` that runs then, or
    as idle; so shares sum to 1.

    Args:
        events: in any order; on one track an event may hold others, which take their time off it.
        start, end: the window, in microseconds; what lies outside is left out.
        num_steps: steps in the window.
        ceilings: kind -> seconds per step at the device's rates.
    """
    assert end > start, f"an empty window: {start} to {end}"
    tracks: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        tracks[event.track].append(event)
    edges: list[tuple[float, int, Kind]] = []
    for track in tracks.values():
        for a, b, kind in _stretches(track):
            a, b = max(a, start), min(b, end)
            if b > a:
                edges += [(a, 1, kind), (b, -1, kind)]
    shown, hidden = _cover(sorted(edges, key=lambda edge: edge[0]))
    shown["idle"] = end - start - sum(shown.values())
    limits = ceilings or {}
    rows = [
        Row(
            kind=kind,
            ms=shown[kind] / num_steps / 1e3,
            share=shown[kind] / (end - start),
            hidden_ms=hidden[kind] / num_steps / 1e3,
            ceiling_ms=limits[kind] * 1e3 if kind in limits else None,
        )
        for kind in (*WORK, "idle")
        if shown[kind] or hidden[kind] or limits.get(kind) or kind == "idle"
    ]
    rows.sort(key=lambda row: -row.ms)
    return TimeTable(num_steps=num_steps, step_ms=(end - start) / num_steps / 1e3, rows=tuple(rows))


def _stretches(track: Sequence[Event]) -> Iterator[tuple[float, float, Kind]]:
    """Yield what a track did when: of events that hold others, the time that is left to them."""
    stack: list[tuple[float, Kind | None, Kind | None]] = []  # end, own kind, kind of all within
    now = 0.0
    for event in sorted(track, key=lambda e: (e.start, -e.end)):
        while stack and stack[-1][0] <= event.start + _ROUNDING:
            yield from _left(now, stack[-1])
            now = max(now, stack.pop()[0])
        if stack and stack[-1][1] and event.start > now:
            yield now, event.start, stack[-1][1]
        now = max(now, event.start)
        within = stack[-1][2] if stack else None
        own = within if within and event.kind else event.kind
        inner = within or (event.kind if event.marks or event.kind in OUTERMOST else None)
        stack.append((event.end, None if event.marks else own, inner))
    while stack:
        yield from _left(now, stack[-1])
        now = max(now, stack.pop()[0])


def _left(
    now: float, top: tuple[float, Kind | None, Kind | None]
) -> Iterator[tuple[float, float, Kind]]:
    end, kind, _ = top
    if kind and end > now:
        yield now, end, kind


def _cover(
    edges: Sequence[tuple[float, int, Kind]],
) -> tuple[dict[Kind, float], dict[Kind, float]]:
    """Return the time that each kind is counted for, and that in which another one hides it."""
    shown: dict[Kind, float] = defaultdict(float)
    hidden: dict[Kind, float] = defaultdict(float)
    running: dict[Kind, int] = defaultdict(int)
    before = 0.0
    for at, change, kind in edges:
        busy = [k for k in WORK if running[k]]
        for k in busy:
            (shown if k == busy[0] else hidden)[k] += at - before
        running[kind] += change
        before = at
    return shown, hidden


def read_trace(trace: Mapping[str, Any], *, device: str) -> tuple[list[Event], tuple[float, float]]:
    """Return the events of a trace as torch.profiler writes it, and the window of its steps.

    Args:
        trace: what the JSON holds.
        device: type of the device; on "cuda" kernels count, else the ops of the host.
    """
    taken, kind_of = (_DEVICE, kind_of_kernel) if device == "cuda" else (_HOST, kind_of_op)
    known = cache(kind_of)
    events: list[Event] = []
    window: tuple[float, float] | None = None
    for found in trace["traceEvents"]:
        category = found.get("cat")
        if found.get("ph") != "X" or (category not in taken and category != "user_annotation"):
            continue
        name, start = found["name"], float(found["ts"])
        end = start + float(found["dur"])
        if name == WINDOW and category == "user_annotation":
            window = start, end
        if category not in taken:
            continue
        marks = name == OPTIMIZER_MARK
        kind: Kind | None = "optimizer" if marks else known(name)
        if "annotation" in category and not marks and kind != "communication":
            continue
        if category == "gpu_user_annotation" and not marks:
            continue
        # Messages of the host end when they arrive, which is not within the op that sent them.
        apart = device != "cuda" and kind == "communication"
        track = (found["pid"], found["tid"], apart)
        events.append(Event(kind=kind, track=track, start=start, end=end, marks=marks))
    assert window is not None, f"the trace has no range {WINDOW!r}"
    return events, window
