"""Profiles some steps of a run: a trace for Perfetto, and a table of where their time went."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from megatree.runtime.op_kinds import OPTIMIZER_MARK
from megatree.runtime.optimizers import Optimizer
from megatree.runtime.time_table import WINDOW, TimeTable, read_trace, time_table


class StepProfile:
    """Records the steps `first` .. `stop` - 1 of a run, counted from 0 where it begins.

    Call it after every step with the number of steps made; leaving it ends a recording that is
    under way, with the steps made so far. The device is waited for at both ends and nowhere
    between, so the steps run ahead of the host as they always do.

    Args:
        first, stop: the steps; the first of a run compiles, so `first` is at least 1.
        file: that the trace goes to; its folder is made.
        device: of this rank.
        ceilings: kind -> seconds per step at the device's rates.
        done: called with the table.
    """

    def __init__(
        self,
        first: int,
        stop: int,
        *,
        file: Path,
        device: torch.device,
        ceilings: Mapping[str, float],
        done: Callable[[TimeTable], None],
    ) -> None:
        assert 1 <= first < stop, f"steps {first}:{stop}"
        self.first, self.stop = first, stop
        self.file, self.device, self.ceilings, self.done = file, device, ceilings, done
        self._made = 0
        self._profiler: torch.profiler.profile | None = None
        self._window: Any = None

    def __call__(self, made: int) -> None:
        """Begin or end where so many steps are made."""
        self._made = made
        if made == self.first:
            self._begin()
        elif made == self.stop:
            self._end()

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profiler is not None and error is None and self._made > self.first:
            self._end()
        elif self._profiler is not None:
            self._stop()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._wait()
        self._window = record_function(WINDOW)
        self._window.__enter__()

    def _stop(self) -> torch.profiler.profile:
        profiler = self._profiler
        assert profiler is not None
        self._wait()
        self._window.__exit__(None, None, None)
        profiler.stop()
        self._profiler = None
        return profiler

    def _end(self) -> None:
        profiler = self._stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.file))
        trace = json.loads(self.file.read_text(encoding="utf-8"))
        events, (start, end) = read_trace(trace, device=self.device.type)
        table = time_table(
            events,
            start=start,
            end=end,
            num_steps=self._made - self.first,
            ceilings=self.ceilings,
        )
        self.done(table)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def marked(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer whose updates a trace shows as one range, and a table as one kind."""

    def update(*args: Any, **options: Any) -> None:
        with record_function(OPTIMIZER_MARK):
            optimizer.update(*args, **options)

    return Optimizer(optimizer.init, update)
