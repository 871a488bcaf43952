"""A function on ranks in fresh processes, under a time limit: its result, or why it has none."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT: Mapping[str, str] = {
    # A program that uses multicast can take the GPUs of a host away from others who share it.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "PYTHONFAULTHANDLER": "1",
}
"""What all runs have: NVLink multicast stays off, and a crash shows where Python was."""

_SHOWN = 2000
"""Characters of what a run that failed has said which are kept."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Args:
        value: rank 0's result; None if it failed.
        error: what went wrong in a line; "" if nothing did.
        said: the end of what a run that failed has printed.
        seconds: from its start to its end, of processes too.
    """

    value: Any
    error: str
    said: str
    seconds: float


def apart(
    fn: Callable[..., Any],
    nproc: int,
    *args: Any,
    limit_s: float,
    device: str = "cuda",
    threads: int = 1,
) -> Outcome:
    """Run `fn(device, *args)` on new ranks, which all end here, whatever becomes of them.

    Args:
        fn: importable by name; its arguments and result pickle.
        nproc: ranks.
        args: further arguments.
        limit_s: seconds for all of it; then every process is killed.
        device: "cuda", or "cpu" to hide GPUs.
        threads: of a rank.
    """
    env = {**os.environ, **ENVIRONMENT}
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    clock = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        job, result, log = (Path(folder) / name for name in ("job", "result", "log"))
        # A group waits less than we do, so that a rank which waits for ever can say so.
        job.write_bytes(pickle.dumps((fn, nproc, args, 0.8 * limit_s, threads)))
        words = [sys.executable, "-m", "benchmarks.apart", str(job), str(result)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                words,
                env=env,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            hangs = False
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                hangs = True
            finally:
                _kill(process)
        seconds = time.monotonic() - clock
        if not hangs and process.returncode == 0 and result.exists():
            value = pickle.loads(result.read_bytes())
            return Outcome(value=value, error="", said="", seconds=seconds)
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        error = f"no result within {limit_s:g} s: hangs or is too slow" if hangs else _last(said)
        error = error or f"exit code {process.returncode}"
        return Outcome(value=None, error=error, said=said[-_SHOWN:], seconds=seconds)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started (they are a session of their own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _end_with_parent() -> None:
    """End this session of processes when the pipe from whoever started it breaks."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _last(said: str) -> str:
    """Return the line of a traceback that names the error, or the last one."""
    lines = [line for line in said.splitlines() if line.strip()]
    named = [line for line in lines if line[:1].isalpha() and ("Error" in line.split(":")[0])]
    return (named or lines or [""])[-1][:300]


def main() -> None:
    """Run the job in a file, and leave its result in another."""
    from megatree.runtime.processes import launch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    job, result = map(Path, sys.argv[1:3])
    fn, nproc, args, timeout_s, threads = pickle.loads(job.read_bytes())
    value = launch(fn, nproc, *args, timeout_s=timeout_s, threads=threads)
    result.write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    main()
