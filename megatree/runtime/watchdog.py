"""A hang ends in a report: which rank waits in which call, and where the others are instead."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatree.runtime.recorded import Recorder

HUNG = 75
"""Exit code of a rank that a watchdog ended."""

_LINES = 16
"""Most lines about ranks in a report."""


class Board(Protocol):
    """Where ranks leave texts for each other without meeting."""

    def post(self, key: str, text: str) -> None:
        """Leave a text."""
        ...

    def read(self, key: str) -> str | None:
        """Return a text, None if it is not there (yet)."""
        ...

    def first(self, key: str) -> bool:
        """Leave "1" there; whether no rank has done so before."""
        ...


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank stands when a hang is looked into.

    Args:
        over: who makes the call together that it waits in; "" if it waits in none.
        call: that call, as print.
        number: its number over the same.
        seconds: how long it has waited.
        counts: over -> number of calls made.
        recent: over -> (number of the first of these calls, their labels).
        stack: where its Python is, innermost first.
    """

    over: str = ""
    call: str = ""
    number: int = 0
    seconds: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    recent: Mapping[str, tuple[int, Sequence[str]]] = field(default_factory=dict)
    stack: Sequence[str] = ()


def standing_of(recorder: Recorder) -> Standing:
    """Return where a rank stands."""
    counts = dict(recorder.counts)
    recent = {
        over: (calls[0].number, [call.label for call in calls])
        for over, known in list(recorder.recent.items())
        if (calls := list(known))
    }
    waiting = recorder.waiting()
    if waiting is None:
        return Standing(counts=counts, recent=recent, stack=recorder.stack())
    call, seconds = waiting
    return Standing(
        over=call.over,
        call=str(call),
        number=call.number,
        seconds=seconds,
        counts=counts,
        recent=recent,
        stack=recorder.stack(),
    )


class Watchdog:
    """A thread that ends a rank which waits too long, with a report of all ranks.

    The first rank that waits longer than the time-out asks all others where they stand, and tells;
    then all end.

    Args:
        recorder: notes the rank's calls.
        board: where the ranks say where they stand.
        rank: this rank.
        coords: rank -> its mesh coordinates, of all ranks.
        timeout_s: seconds that a rank may wait in one call.
        end: what ends the process: (report, whether this rank tells it).
        poll_s: seconds between looks; 0 for a tenth of the time-out, at most 5.
    """

    def __init__(
        self,
        recorder: Recorder,
        board: Board,
        *,
        rank: int,
        coords: Sequence[Mapping[str, int]],
        timeout_s: float,
        end: Callable[[str, bool], None] | None = None,
        poll_s: float = 0.0,
    ) -> None:
        self.recorder, self.board, self.rank, self.coords = recorder, board, rank, coords
        self.timeout_s, self.end = timeout_s, end or end_process
        self.poll_s = poll_s or min(5.0, timeout_s / 10)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.recorder.watched = True
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.recorder.watched = False

    def _watch(self) -> None:
        while not self._over.wait(self.poll_s):
            waiting = self.recorder.waiting()
            late = waiting is not None and waiting[1] > self.timeout_s
            if late or self.board.read("hang") is not None:
                self._end()
                return

    def _end(self) -> None:
        """Say where this rank stands, and end it once that is told, or cannot be."""
        text, tells = f"hang: rank {self.rank} ends, and what the others say is lost", False
        try:
            tells = self.board.first("hang")
            self.board.post(f"hang.{self.rank}", json.dumps(vars(standing_of(self.recorder))))
            patience = 2 * self.poll_s + 1.0  # the others look as often as this rank
            if tells:
                text = report(self._gather(patience), self.coords, self.timeout_s)
                self.board.post("hang.report", text)
            else:
                text = self._read("hang.report", 2 * patience) or text
        finally:
            self.end(text, tells)

    def _gather(self, patience: float) -> dict[int, Standing]:
        deadline = time.monotonic() + patience
        texts = {
            rank: self._read(f"hang.{rank}", deadline - time.monotonic())
            for rank in range(len(self.coords))
        }
        return {rank: Standing(**json.loads(text)) for rank, text in texts.items() if text}

    def _read(self, key: str, patience: float) -> str | None:
        deadline = time.monotonic() + patience
        while (text := self.board.read(key)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return text


def end_process(text: str, tells: bool) -> None:
    """End this process as it is: its own thread waits where nothing can reach it."""
    if tells:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    os._exit(HUNG)


def report(
    found: Mapping[int, Standing], coords: Sequence[Mapping[str, int]], timeout_s: float
) -> str:
    """Say of a hang who waits in what, who does not, and where their calls began to differ.

    Args:
        found: rank -> where it stands; ranks without an answer are left out.
        coords: rank -> mesh coordinates, of all ranks.
        timeout_s: seconds after which a wait is a hang.
    """
    silent = sorted(set(range(len(coords))) - set(found))
    said: dict[str, list[int]] = {}
    for rank, standing in sorted(found.items()):
        said.setdefault(_sentence(standing), []).append(rank)
    if silent:
        said["gave no answer: gone, or stuck outside Python"] = silent
    lines = [f"  {_ranks(ranks)}: {text}" for text, ranks in said.items()]
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"  and {len(lines) - _LINES} more"]
    late = {r: s for r, s in found.items() if s.over not in ("", "alone")}
    late = late or {r: s for r, s in found.items() if s.over}
    lines += _blame(found, late, coords)
    if late:
        first = max(late, key=lambda rank: late[rank].seconds)
        head = f"rank {first} has waited {late[first].seconds:.3g} s in {late[first].call}"
    else:
        head = "a rank waited, and went on while the others were asked"
    return "\n".join(
        [
            f"hang: {head}. Every rank has to make the same calls in the same order, within "
            f"health.hang_s ({timeout_s:g} s):",
            *lines,
        ]
    )


def _sentence(standing: Standing) -> str:
    if standing.over not in ("", "alone"):
        return f"waits in {standing.call}"
    return f"waits for nobody, is at {' < '.join(standing.stack) or '?'}"


def _blame(
    found: Mapping[int, Standing],
    late: Mapping[int, Standing],
    coords: Sequence[Mapping[str, int]],
) -> list[str]:
    """Compare what the ranks of a call have called over the same so far."""
    lines: list[str] = []
    for rank, standing in sorted(late.items()):
        for other in partners(standing.over, rank, coords):
            if other not in found or other == rank or (other < rank and other in late):
                continue
            made = found[other].counts.get(standing.over, 0)
            differs = _first_difference(standing, found[other], standing.over)
            if differs is not None:
                number, mine, theirs = differs
                lines.append(
                    f"  call {number} over {standing.over} was {mine} on rank {rank}, and "
                    f"{theirs} on rank {other}"
                )
            elif made < standing.number:
                lines.append(
                    f"  rank {other} has made {made} calls over {standing.over}, rank {rank} "
                    f"waits in its call {standing.number}"
                )
            if len(lines) >= 4:
                return lines
    return lines


def _first_difference(mine: Standing, theirs: Standing, over: str) -> tuple[int, str, str] | None:
    if over not in mine.recent or over not in theirs.recent:
        return None
    (a, labels), (b, others) = mine.recent[over], theirs.recent[over]
    for number in range(max(a, b), min(a + len(labels), b + len(others))):
        if labels[number - a] != others[number - b]:
            return number, labels[number - a], others[number - b]
    return None


def partners(over: str, rank: int, coords: Sequence[Mapping[str, int]]) -> list[int]:
    """Return the ranks that make a call together.

    >>> partners("tp", 1, [{"dp": 0, "tp": 0}, {"dp": 0, "tp": 1}, {"dp": 1, "tp": 0}])
    [0, 1]
    """
    if over == "all ranks":
        return list(range(len(coords)))
    first, _, members = over.partition(" ")
    axes = set(first.split("."))
    here = {axis: at for axis, at in coords[rank].items() if axis not in axes}
    kept = {int(m) for m in members.replace(">", " ").split()}
    return [
        other
        for other, at in enumerate(coords)
        if all(at[axis] == here[axis] for axis in here) and (not kept or at[first] in kept)
    ]


def _ranks(ranks: Sequence[int]) -> str:
    """Write ranks as "rank 3" or "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
