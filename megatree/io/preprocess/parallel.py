"""Map a function over a stream with several processes, in order, with bounded memory."""

import multiprocessing
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_PACKAGE = str(Path(__file__).parents[2])
_AHEAD = 3  # items in flight per worker: enough that none waits for the slowest before it


def ordered_map(fn: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield `fn(item)` for each item in order, as `map` does.

    With one worker the work is done here. With more, `fn` and the items are pickled to processes
    of one thread each, which end with this one, however it ends. At most a few items per worker
    are read ahead.

    Args:
        fn: picklable: a function of a module, or a `functools.partial` of one.
        items: read from this process.
        workers: processes, at least 1.

    Raises:
        ValueError: if `workers` is below 1.
        ChildProcessError: if a worker dies.
    """
    if workers < 1:
        raise ValueError(f"workers: {workers} do no work. Use at least 1.")
    return map(fn, items) if workers == 1 else _spread(fn, items, workers)


@dataclass(frozen=True)
class _Refused:
    """The text of an error that this package raised for the user to mend."""

    text: str


def _answer(fn: Callable[[T], R], item: T) -> R | _Refused:
    try:
        return fn(item)
    except ValueError as error:
        # Raised again by the parent: out of the pool it would look like an error of the pool's.
        if traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE):
            return _Refused(str(error))
        raise


def _taken(future: Future[R | _Refused]) -> R:
    result = future.result()
    if isinstance(result, _Refused):
        raise ValueError(result.text)
    return result


def _spread(fn: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    # Not by fork: this process may have threads (a progress bar, the tokenizer's own).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    waiting: deque[Future[R | _Refused]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_answer, fn, item))
            if len(waiting) >= _AHEAD * workers:
                yield _taken(waiting.popleft())
        while waiting:
            yield _taken(waiting.popleft())
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "workers: one of the processes died; the system may have killed it for want of "
            f"memory. Use fewer than {workers} workers, or a smaller max-line-bytes."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # A worker is one core's worth of work; the tokenizers library would use all cores in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"

    def follow() -> None:
        # The pool's pipes stay open in the workers: without this they outlive a killed parent.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
