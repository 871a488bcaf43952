"""Start, join and stop the processes of a job; the rank that failed first speaks first."""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from megatree.io.world import World
from megatree.runtime.refusals import refusal
from megatree.runtime.watchdog import HUNG

_GRACE = 0.3
"""Seconds to wait for other reports: peers of a dead rank fail too, sometimes before it is seen."""

_BOARD = "megatree."
"""What the keys of texts in the store begin with."""

_EXIT = 5.0
"""Seconds that a rank which has reported may take to end by itself."""


class RankFailed(RuntimeError):  # noqa: N818 (it says what happened)
    """A process of the job raised or died; the message starts with its traceback.

    Args:
        text: the message.
        refusal: what to tell a user instead, if it is theirs to fix.
    """

    def __init__(self, text: str, refusal: str | None = None) -> None:
        super().__init__(text)
        self.refusal = refusal


def current_world() -> World:
    """Return the process group as a World if this process has joined one, else a world of one."""
    return world_of_group() if dist.is_initialized() else World.single()


def background_world() -> World:
    """Return the processes over connections of their own, for a thread beside the training.

    Every rank calls it. Messages of two threads over the same connections would be taken for each
    other's.
    """
    if not dist.is_initialized():
        return World.single()
    # In time the waiting for a rank whose disk is slow; a rank that is gone ends the job anyway.
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
    return world_of_group(group)


def world_of_group(group: dist.ProcessGroup | None = None) -> World:
    """Return a process group of all ranks as a World; None is the initialised one."""

    def gather(value: Any) -> list[Any]:
        out: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(out, value, group=group)
        return out

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=group)
        return box[0]

    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        barrier=lambda: cast(None, dist.barrier(group)),
        gather=gather,
        broadcast=broadcast,
    )


class GroupBoard:
    """Texts that the processes of the initialised group leave in its store."""

    def __init__(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        # A connection of its own: the process's own may be in use by a call that hangs.
        self.store = cast(Any, store).clone()

    def post(self, key: str, text: str) -> None:
        """Leave a text."""
        self.store.set(f"{_BOARD}{key}", text)

    def read(self, key: str) -> str | None:
        """Return a text, None if it is not there (yet)."""
        key = f"{_BOARD}{key}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def first(self, key: str) -> bool:
        """Leave "1" there; whether no rank has done so before."""
        first = self.store.add(f"{_BOARD}{key}.count", 1) == 1
        self.post(key, "1")
        return first


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def join_job(*, timeout_s: float = 600.0) -> torch.device:
    """Join the job that a launcher describes in the environment; return this rank's device."""
    device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device


def leave_job() -> None:
    """Leave the job that `join_job` joined."""
    dist.destroy_process_group()


def local_device(local_rank: int) -> torch.device:
    """Return the GPU of a local rank if there is one for it, else the CPU."""
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def launch(
    fn: Callable[..., Any], nproc: int, *args: Any, timeout_s: float = 600.0, threads: int = 0
) -> Any:
    """Run `fn(device, *args)` on `nproc` new processes of this machine joined in a process group.

    If a rank raises or dies, the others are stopped and its traceback comes first.

    Args:
        fn: an importable function; its arguments and result must pickle.
        nproc: number of processes.
        args: further arguments.
        timeout_s: seconds that a collective may wait.
        threads: torch threads per process; 0 shares the machine's cores.

    Returns:
        Rank 0's result.

    Raises:
        RankFailed: a rank raised or died.
    """
    context = multiprocessing.get_context("spawn")
    threads = threads or max(1, (os.cpu_count() or 1) // nproc)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        try:
            for rank in range(nproc):
                pipe, far = context.Pipe(duplex=False)
                job = (rank, nproc, f"{folder}/store", threads, timeout_s, fn, args, far)
                process = context.Process(target=_rank_main, args=job, name=f"rank {rank}")
                process.start()
                far.close()
                processes.append(process)
                pipes.append(pipe)
            with forwarded(signal.SIGTERM, processes):
                result = _wait(processes, pipes, partial(_last_words, f"{folder}/store", nproc))
            for process in processes:  # what a rank has started (compilers) it also cleans up
                process.join(_EXIT)
            return result
        finally:
            for process in processes:
                process.kill()
                process.join()


class _Failure(NamedTuple):
    """When and how a rank failed, and what a user is told if it is theirs to fix."""

    time_s: float
    rank: int
    text: str
    refusal: str | None


@contextmanager
def forwarded(number: signal.Signals, processes: Sequence[BaseProcess]) -> Generator[None]:
    """Hand a signal that this process gets to others, which know what to do about it.

    Python handles signals in the main thread alone: in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(*_: object) -> None:
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    before = signal.signal(number, hand_on)
    try:
        yield
    finally:
        signal.signal(number, before)


def _last_words(store: str, nproc: int) -> str | None:
    """Return the report that a watchdog left before it ended its rank."""
    left = dist.FileStore(store, nproc)
    key = f"{_BOARD}hang.report"
    return left.get(key).decode() if left.check([key]) else None


def _wait(
    processes: list[BaseProcess],
    pipes: list[connection.Connection],
    last_words: Callable[[], str | None],
) -> Any:
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    open_pipes = dict(enumerate(pipes))
    while open_pipes and not failures:
        failures += _read(open_pipes, processes, results, last_words, None)
    if failures:
        while open_pipes:
            more = _read(open_pipes, processes, results, last_words, _GRACE)
            if not more:
                break
            failures += more
        first = min(failures, key=lambda failure: failure.time_s)
        text = f"rank {first.rank} of {len(processes)} failed first:\n{first.text}"
        raise RankFailed(text, first.refusal)
    return results[0]


def _read(
    open_pipes: dict[int, connection.Connection],
    processes: list[BaseProcess],
    results: dict[int, Any],
    last_words: Callable[[], str | None],
    timeout: float | None,
) -> list[_Failure]:
    """Take the reports that are ready; return the failures among them, the dead ones foremost."""
    failures = []
    for pipe in connection.wait(list(open_pipes.values()), timeout):
        rank = next(r for r, p in open_pipes.items() if p is pipe)
        del open_pipes[rank]
        try:
            time_s, value, text = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
        except EOFError:
            processes[rank].join(1.0)
            code = processes[rank].exitcode
            told = last_words() if code == HUNG else None
            text = told or f"the process died without a word (exit code {code})"
            failures.append(_Failure(0.0, rank, text, told))
            continue
        if text:
            failures.append(_Failure(time_s, rank, text, value))
        else:
            results[rank] = value
    return failures


def _rank_main(
    rank: int,
    nproc: int,
    store: str,
    threads: int,
    timeout_s: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    pipe: connection.Connection,
) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        device = local_device(rank) if torch.cuda.device_count() >= nproc else torch.device("cpu")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(store, nproc),
            rank=rank,
            world_size=nproc,
            timeout=timedelta(seconds=timeout_s),
        )
        value = fn(device, *args)
        dist.barrier()
        sys.stdout.flush()  # whoever launched us does not wait for ever
        pipe.send_bytes(pickle.dumps((time.time(), value if rank == 0 else None, "")))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((time.time(), refusal(error), traceback.format_exc())))
        sys.stdout.flush()
        os._exit(1)  # no clean-up: peers may wait for this rank for ever
    dist.destroy_process_group()


def _die_with_parent() -> None:
    """End this rank when the process that launched it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
