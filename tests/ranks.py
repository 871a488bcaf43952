"""Run a test body as n gloo processes on this machine, and report the rank that failed first."""

import functools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["pytest", "tests.warm", "tests.ranks"])
# A rank that dies takes its peers' collectives with it; their errors may arrive first by this much.
_GRACE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class _Report:
    """How a rank ended: `text` is a traceback, the reason of a skip, or empty for a pass."""

    rank: int
    kind: str
    text: str
    time_s: float


def ranks(world: int, *, timeout_s: float = 60.0) -> Callable[[Callable], Callable]:
    """Decorate a test so that its body runs on `world` ranks of a gloo process group.

    The test passes if the body returns on every rank. Otherwise all ranks are stopped, and the
    failure shows the traceback of the rank that raised first, the exit codes of ranks that died,
    or the ranks still running at the time-out. A skip on any rank skips the test. Parameters and
    fixtures reach the body as they are, so they must pickle; warnings are handled as in the test.

    Args:
        world: number of ranks.
        timeout_s: seconds for the whole body.
    """

    def decorate(body: Callable) -> Callable:
        @functools.wraps(body)
        def test(**kwargs: object) -> None:
            with tempfile.TemporaryDirectory() as folder:
                _run(test, kwargs, world, timeout_s, f"{folder}/store")

        return test

    return decorate


def _run(test: Callable, kwargs: dict, world: int, timeout_s: float, store: str) -> None:
    _start_server()
    procs, pipes = [], []
    try:
        for rank in range(world):
            pipe, far = _fork.Pipe(duplex=False)
            job = (rank, world, store, timeout_s, test, kwargs, _warning_filters(), far)
            proc = _fork.Process(target=_rank, args=job)
            proc.start()
            far.close()  # or the end of the rank would not close the pipe
            procs.append(proc)
            pipes.append(pipe)
        reports = _collect(pipes, timeout_s)
        for rank, report in reports.items():
            if report is None:
                procs[rank].join(1.0)  # dying: wait for its exit code rather than kill it
    finally:
        for proc in procs:
            proc.kill()
            proc.join()
    exitcodes = [proc.exitcode for proc in procs]
    _judge(reports, exitcodes, timeout_s)


def _collect(pipes: list[connection.Connection], timeout_s: float) -> dict[int, _Report | None]:
    """Read one report per rank, None for a rank that died; soon after a failure, stop waiting."""
    reports: dict[int, _Report | None] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in connection.wait(list(waiting), left):
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            try:
                reports[rank] = pipe.recv()
            except EOFError:
                reports[rank] = None
            if (report := reports[rank]) is None or report.kind != "passed":
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return reports


def _judge(
    reports: dict[int, _Report | None], exitcodes: list[int | None], timeout_s: float
) -> None:
    world = len(exitcodes)
    died = {rank: exitcodes[rank] for rank in sorted(reports) if reports[rank] is None}
    told = sorted(filter(None, reports.values()), key=lambda report: report.time_s)
    failed = [
        f"rank {report.rank} of {world} failed first:\n{report.text}"
        for report in told
        if report.kind == "failed"
    ]
    if died:
        failed.insert(0, f"ranks of {world} that died without a word, with exit codes: {died}")
    if failed:
        pytest.fail(failed[0], pytrace=False)
    if skipped := [report for report in told if report.kind == "skipped"]:
        pytest.skip(skipped[0].text)
    if hung := sorted(set(range(world)) - set(reports)):
        pytest.fail(f"ranks {hung} of {world} still running after {timeout_s} s", pytrace=False)


def _rank(
    rank: int,
    world: int,
    store: str,
    timeout_s: float,
    test: Callable,
    kwargs: dict,
    filters: list[tuple],
    pipe: connection.Connection,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.resetwarnings()
    for action, message, category, module, lineno in reversed(filters):
        warnings.filterwarnings(action, message, category, module, lineno)
    kind, text = "passed", ""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=2 * timeout_s),  # ours fires first and says more
        )
        vars(test)["__wrapped__"](**kwargs)
        dist.barrier()
    except pytest.skip.Exception as skip:
        kind, text = "skipped", str(skip)
    except BaseException:
        kind, text = "failed", traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(_Report(rank=rank, kind=kind, text=text, time_s=time.monotonic()))
    if kind == "passed":
        dist.destroy_process_group()
    os._exit(0)  # peers may be gone: no clean-up that waits for them


def _start_server() -> None:
    # The server imports what we preload from PYTHONPATH only (before 3.13 it drops sys.path).
    root = str(Path(__file__).parents[1])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _warning_filters() -> list[tuple]:
    """Return the filters in force, patterns as strings, strongest first."""

    def pattern(one: object) -> str:
        return "" if one is None else getattr(one, "pattern", str(one))

    return [(a, pattern(m), c, pattern(mod), line) for a, m, c, mod, line in warnings.filters]
