"""A pipeline of which one rank raises, dies or hangs stops, and says first what went wrong."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import one_f_one_b
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.processes import RankFailed, launch
from megatree.runtime.step import train_step
from tests.ranks import ranks

CFG = GPTConfig(vocab_size=16, seq_length=4, num_layers=2, embed=8, kv_heads=2, head_dim=4, ffn=8)
TIMEOUT_S = 8.0
"""Also of the start, where one rank waits for another on a busy machine."""
LIMIT_S = 30.0
"""From a failure to the end of the job: the timeout, and stopping on a busy machine."""


def fail(how: str) -> None:
    if how == "raises":
        raise ArithmeticError("the bug itself")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        threading.Event().wait()


def train(device: torch.device, layout: Layout, rank: int, how: str, begun: str) -> None:
    """Train; one rank fails in the third forward of the second step, and notes the time."""
    comm = ProcessComm(layout.mesh, device)
    step = train_step(gpt(CFG, batch_size=2), layout, adamw(1e-3), comm=comm)
    tokens = torch.arange(2 * 4).reshape(2, 4)
    batch = {"tokens": tokens, "labels": tokens, "weights": torch.ones(2, 4)}
    state, _ = step(step.init(0), [step.local(batch)] * 4)
    executor, calls = step.gradients.executor, [0]
    run = executor.bound.run

    def run_until_it_fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if layout.mesh.coords(rank) == comm.coords and calls[0] == 3:
            Path(begun).write_text(str(time.time()))
            fail(how)
        return run(*args, **kwargs)

    executor.bound.run = run_until_it_fails  # type: ignore[method-assign]
    step(state, [step.local(batch)] * 4)


def failure(folder: Path, layout: Layout, rank: int, how: str) -> str:
    begun = folder / "begun"
    size, job = layout.mesh.num_ranks, (layout, rank, how, str(begun))
    with pytest.raises(RankFailed) as caught:
        launch(train, size, *job, timeout_s=TIMEOUT_S, threads=1)
    assert time.time() - float(begun.read_text()) < LIMIT_S
    return str(caught.value)


def test_a_rank_that_raises_is_the_first_to_speak(tmp_path: Path) -> None:
    """The others fail too, in a receive: their tracebacks say nothing of the cause."""
    text = failure(tmp_path, Layout(Mesh(pp=2), schedule=one_f_one_b), 1, "raises")
    assert text.startswith("rank 1 of 2 failed first:\nTraceback (most recent call last):\n")
    assert text.rstrip().endswith("ArithmeticError: the bug itself")


@pytest.mark.full
def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    text = failure(tmp_path, Layout(Mesh(pp=2), schedule=one_f_one_b), 0, "dies")
    assert text == "rank 0 of 2 failed first:\nthe process died without a word (exit code -9)"


@pytest.mark.full
def test_a_rank_that_hangs_stops_the_job_within_the_timeout(tmp_path: Path) -> None:
    """Its neighbour's receive times out; the message says in which action, and who is silent."""
    text = failure(tmp_path, Layout(Mesh(pp=2), schedule=one_f_one_b), 1, "hangs")
    assert text.startswith("rank 0 of 2 failed first:\nTraceback (most recent call last):\n")
    assert "imed out" in text or "timeout" in text.lower()


@pytest.mark.full
@pytest.mark.parametrize("how", ["raises", "dies", "hangs"])
def test_a_pipeline_with_tensor_parallelism_stops_too(tmp_path: Path, how: str) -> None:
    """A hang may show first in a tensor-parallel group: its timeout is the job's, not torch's."""
    rules = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    text = failure(tmp_path, Layout(Mesh(pp=2, tp=2), rules, schedule=one_f_one_b), 3, how)
    if how != "hangs":
        assert text.startswith("rank 3 of 4 failed first:\n")


@ranks(2)
def test_groups_of_a_mesh_wait_no_longer_than_the_job() -> None:
    """torch gives a new group half an hour, whatever the job was started with."""
    comm = ProcessComm(Mesh(pp=2))
    comm.prepare([("pp",)])
    comm.prepare_members("pp", (0, 1))
    job = dist.group.WORLD._get_backend(comm.device).options._timeout  # type: ignore[union-attr]
    assert job == timedelta(seconds=120)
    for group in (comm.groups["pp",][0], comm.member_groups["pp", (0, 1)]):
        assert group._get_backend(comm.device).options._timeout == job
