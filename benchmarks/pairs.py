"""Two functions timed in turns, so that a busy machine slows both alike, and their ratio."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Times of pairs of calls, in seconds; `ours` and `theirs` of one index are one pair.

    Args:
        ours, theirs: wall time.
        cpu_ours, cpu_theirs: time for which this process, all its threads, had a CPU.
    """

    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    cpu_ours: tuple[float, ...]
    cpu_theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Our time over theirs, pair by pair."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def cpu_ratios(self) -> list[float]:
        """Our CPU time over theirs, pair by pair."""
        return [a / b for a, b in zip(self.cpu_ours, self.cpu_theirs, strict=True)]


def interleave(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int, warmup: int = 3
) -> Pairs:
    """Call two functions in turns and time every call; who goes first alternates.

    Args:
        ours, theirs: called without arguments.
        pairs: number of pairs that count.
        warmup: number of pairs before them.
    """
    clock = time.perf_counter, time.process_time
    calls: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(-warmup, pairs):
        for is_ours in (True, False) if number % 2 else (False, True):
            fn = ours if is_ours else theirs
            start = [now() for now in clock]
            fn()
            wall, cpu = (now() - then for now, then in zip(clock, start, strict=True))
            if number >= 0:
                calls[is_ours].append((wall, cpu))
    (wall_ours, cpu_ours), (wall_theirs, cpu_theirs) = (
        zip(*calls[k], strict=True) for k in (True, False)
    )
    return Pairs(ours=wall_ours, theirs=wall_theirs, cpu_ours=cpu_ours, cpu_theirs=cpu_theirs)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high}


def report(name: str, **values: Any) -> None:
    """Print a result as one JSON line."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"benchmark": name, **rounded}), flush=True)
