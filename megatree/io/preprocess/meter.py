"""How far a job is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Shows documents, documents/s and MB/s while the block runs.

    Args:
        label: what is going on.
        stream: where; a bar if it is a terminal.
        clock: seconds.
    """

    def __init__(
        self,
        label: str,
        *,
        stream: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._clock = clock
        self._start = self._last_line = clock()
        self._progress: Progress | None = None

    def __enter__(self) -> "Meter":
        self._start = self._last_line = self._clock()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._progress.add_task(self._label, total=None, rates="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(
        self, documents: int, num_bytes: int, *, done: int | None = None, total: int | None = None
    ) -> None:
        """Show the counts so far.

        Args:
            documents: done.
            num_bytes: read, uncompressed.
            done: of `total`, in any unit; None if the end is not known.
            total: all there is to do.
        """
        rates = self.rates(documents, num_bytes)
        if self._progress is not None:
            (task,) = self._progress.task_ids
            self._progress.update(task, completed=done or 0, total=total, rates=rates)
            return
        now = self._clock()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            share = f"{100 * done / total:.0f}%  " if done is not None and total else ""
            self._console.print(f"{self._label}: {share}{rates}")

    def rates(self, documents: int, num_bytes: int) -> str:
        """Return counts and rates since the start, as text."""
        seconds = max(self._clock() - self._start, 1e-9)
        told = f"{documents:,} documents  {documents / seconds:,.0f} documents/s"
        return f"{told}  {num_bytes / seconds / 1e6:.2f} MB/s" if num_bytes else told
