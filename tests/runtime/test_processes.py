"""A job ends when a rank fails, however it fails, and says first what the rank said."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatree.parallel.mesh import Mesh
from megatree.runtime.processes import RankFailed, launch, world_of_group

TOTAL = 7


def _sum_of_ranks(device: torch.device, offset: int) -> tuple[str, list[int]]:
    world = world_of_group()
    return str(device), world.gather(world.rank + offset)


def test_a_job_returns_what_rank_0_does() -> None:
    assert launch(_sum_of_ranks, 2, TOTAL) == ("cpu", [7, 8])


def _raise_on_one(device: torch.device) -> None:
    world = world_of_group()
    if world.rank == 1:
        raise KeyError("the bug itself")
    world.barrier()  # fails later: its peer is gone


def test_a_rank_that_raises_stops_the_job_with_its_traceback() -> None:
    with pytest.raises(RankFailed) as caught:
        launch(_raise_on_one, 2)
    text = str(caught.value)
    assert text.startswith("rank 1 of 2 failed first:\nTraceback (most recent call last):\n")
    assert text.rstrip().endswith("KeyError: 'the bug itself'")
    assert caught.value.refusal is None


def _kill_one(device: torch.device) -> None:
    world = world_of_group()
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def test_a_rank_that_is_killed_stops_the_job_and_is_named() -> None:
    with pytest.raises(RankFailed) as caught:
        launch(_kill_one, 2)
    assert str(caught.value) == (
        "rank 0 of 2 failed first:\nthe process died without a word (exit code -9)"
    )


def _refuse(device: torch.device) -> None:
    Mesh(tp=0)


def test_what_a_user_can_mend_is_told_apart_from_bugs() -> None:
    with pytest.raises(RankFailed, match="Traceback") as caught:
        launch(_refuse, 2)
    assert caught.value.refusal == "Mesh: axis 'tp' has size 0. Give at least 1."


def _wait_for_ever(device: torch.device) -> None:
    os.write(1, b"up\n")
    threading.Event().wait()


def test_ranks_do_not_outlive_a_launcher_that_is_killed() -> None:
    """Only this test sees orphans: they would go on using the machine, and holding our output."""
    code = (
        "from megatree.runtime.processes import launch\n"
        "from tests.runtime.test_processes import _wait_for_ever\n"
        "if __name__ == '__main__':\n"
        "    launch(_wait_for_ever, 2)\n"
    )
    root = Path(__file__).parents[2]
    launcher = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]
    launcher.kill()
    # The pipe ends when the last process that holds it has ended.
    assert launcher.communicate(timeout=60) == (b"", None)
