"""Batches read ahead by a thread, for one rank, from any sample on."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from megatree.io.data.stream import Batches, Columns


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """What one rank reads for one optimizer step.

    Attributes:
        consumed: samples that all ranks together had consumed before this step.
        num_samples: samples of the step over all ranks and microbatches.
        microbatches: this rank's part of each; arrays, or pinned tensors.
    """

    consumed: int
    num_samples: int
    microbatches: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of the samples one rank reads.

    Microbatch i of a step is the same samples on every mesh; ranks cut within it.

    Attributes:
        microbatch_size: samples of a microbatch over all ranks; None takes the whole step.
        rows: (lo, hi) of a microbatch; all by default.
        columns: (lo, hi), or places, of the sequence; all by default.
    """

    microbatch_size: int | None = None
    rows: tuple[int, int] | None = None
    columns: Columns = None


class Loader:
    """Iterate over the steps of a run: at most `prefetch` steps are read ahead.

    `Loader(..., consumed=c)` goes on where a run stopped that had consumed `c` samples, also with
    another batch size, other microbatches or another share per rank.

    Args:
        source: deals samples by number.
        batch_size: samples of a step over all ranks, or a function of the samples consumed before
            it (a ramp-up).
        share: which part this rank reads.
        consumed: samples consumed by the run so far.
        stop: samples after which the run ends; a step that would pass it is not made. None: never.
        prefetch: steps read ahead by a thread; 0 reads when asked.
        pin: give tensors in page-locked memory, to copy to the device without waiting.

    Raises:
        ValueError: at the step where it happens: a batch size is not positive or not divisible,
            the data ends, or a file changed.
    """

    def __init__(
        self,
        source: Batches,
        *,
        batch_size: int | Callable[[int], int],
        share: Share = Share(),
        consumed: int = 0,
        stop: int | None = None,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        if prefetch < 0 or consumed < 0:
            raise ValueError(
                f"Loader: prefetch {prefetch} and consumed {consumed} must not be negative. "
                "Use 0 or more."
            )
        if pin and not _has_cuda():
            raise ValueError("Loader: pin needs CUDA, which is not there. Use pin=False.")
        size = batch_size if callable(batch_size) else lambda consumed: batch_size
        self._steps = _steps(source, size, share, consumed, stop, pin)
        self._consumed = consumed
        self._ahead = _ReadAhead(self._steps, prefetch) if prefetch else None

    @property
    def consumed(self) -> int:
        """Samples consumed by all ranks after the step that was handed out last."""
        return self._consumed

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> StepBatch:
        step = next(self._steps) if self._ahead is None else self._ahead.get()
        self._consumed = step.consumed + step.num_samples
        return step

    def close(self) -> None:
        """Stop the thread; what it read ahead is dropped."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _ReadAhead:
    """Runs an iterator in a thread, a bounded number of values ahead."""

    def __init__(self, values: Iterator[StepBatch], depth: int) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(
            target=_fill,
            args=(values, self._queue, self._room, self._stop),
            name="loader",
            daemon=True,
        )
        self._thread.start()
        # The thread does not know this object, so a forgotten loader ends its thread.
        self._finish = weakref.finalize(self, _finish, self._room, self._stop)

    def get(self) -> StepBatch:
        if self._ended is None:
            if self._stop.is_set():
                raise ValueError("Loader: is closed. Make a new one with consumed=loader.consumed.")
            value = self._queue.get()
            self._room.release()
            if not isinstance(value, BaseException):
                return value
            self._ended = value
        raise self._ended

    def close(self) -> None:
        self._finish()
        self._thread.join()


def _finish(room: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    room.release()


def _fill(
    values: Iterator[StepBatch],
    filled: "queue.SimpleQueue[Any]",
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Put each value, and at the end what ended them: StopIteration or an error."""
    while True:
        room.acquire()
        if stop.is_set():
            return
        try:
            filled.put(next(values))
        except BaseException as error:
            filled.put(error)
            return


def _steps(
    source: Batches,
    batch_size: Callable[[int], int],
    share: Share,
    consumed: int,
    stop: int | None,
    pin: bool,
) -> Iterator[StepBatch]:
    while True:
        size = batch_size(consumed)
        micro = size if share.microbatch_size is None else share.microbatch_size
        if size < 1 or micro < 1 or size % micro:
            raise ValueError(
                f"Loader: {size} samples of the step after {consumed} are no whole number of "
                f"microbatches of {micro}. Make the batch size a multiple."
            )
        if stop is not None and consumed + size > stop:
            return
        if (verify := getattr(source, "verify", None)) is not None:
            verify()
        options = {} if share.columns is None else {"columns": share.columns}
        parts = [
            source.batch(at, micro, rows=share.rows, **options)
            for at in range(consumed, consumed + size, micro)
        ]
        yield StepBatch(
            consumed=consumed,
            num_samples=size,
            microbatches=[_pinned(part) for part in parts] if pin else list(parts),
        )
        consumed += size


def _has_cuda() -> bool:
    import torch  # not at the top: a worker that only reads needs no torch

    return torch.cuda.is_available()


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array).pin_memory() for name, array in batch.items()}
