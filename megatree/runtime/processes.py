"""Start, join and stop the processes of a job; the rank that failed first speaks first."""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from megatree.io.world import World

_GRACE = 0.3
"""Seconds to wait for other reports: peers of a dead rank fail too, sometimes before it is seen."""


class RankFailed(RuntimeError):
    """A process of the job raised or died; the message starts with its traceback."""


def world_of_group() -> World:
    """Return the initialised process group as a World."""

    def gather(value: Any) -> list[Any]:
        out: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(out, value)
        return out

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        barrier=dist.barrier,
        gather=gather,
        broadcast=broadcast,
    )


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def join_job(*, timeout_s: float = 600.0) -> torch.device:
    """Join the job that a launcher describes in the environment; return this rank's device."""
    device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device


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
            return _wait(processes, pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait(processes: list[BaseProcess], pipes: list[connection.Connection]) -> Any:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    open_pipes = dict(enumerate(pipes))
    while open_pipes and not failures:
        failures += _read(open_pipes, processes, results, None)
    if failures:
        while open_pipes:
            more = _read(open_pipes, processes, results, _GRACE)
            if not more:
                break
            failures += more
        died = [f for f in failures if f[0] == 0.0]
        _, rank, text = min(died or failures)
        raise RankFailed(f"rank {rank} of {len(processes)} failed first:\n{text}")
    return results[0]


def _read(
    open_pipes: dict[int, connection.Connection],
    processes: list[BaseProcess],
    results: dict[int, Any],
    timeout: float | None,
) -> list[tuple[float, int, str]]:
    """Take the reports that are ready; return the failures among them as (time, rank, text)."""
    failures = []
    for pipe in connection.wait(list(open_pipes.values()), timeout):
        rank = next(r for r, p in open_pipes.items() if p is pipe)
        del open_pipes[rank]
        try:
            time_s, value, text = pipe.recv()  # type: ignore[union-attr]
        except EOFError:
            processes[rank].join(1.0)
            code = processes[rank].exitcode
            failures.append((0.0, rank, f"the process died without a word (exit code {code})"))
            continue
        if text:
            failures.append((time_s, rank, text))
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
    try:
        device = local_device(rank) if torch.cuda.device_count() >= nproc else torch.device("cpu")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=nproc,
            timeout=timedelta(seconds=timeout_s),
        )
        value = fn(device, *args)
        dist.barrier()
        pipe.send((time.time(), value if rank == 0 else None, ""))
    except BaseException:
        pipe.send((time.time(), None, traceback.format_exc()))
        sys.stdout.flush()
        os._exit(1)  # no clean-up: peers may wait for this rank for ever
    dist.destroy_process_group()
