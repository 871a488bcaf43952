"""A rank, or all of them, killed at random moments of a save, in the foreground or behind it."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatree.io.checkpoint import Piece, save, step_name
from megatree.io.world import World
from tests.io.checkpoint.forked import Server, assert_latest_is_whole, serving

ONE = World.single()
SIZE = 3
VICTIMS = {"rank 0": [0], "rank 2": [2], "all ranks": [0, 1, 2]}


def start(server: Server, directory: Path, first: int, host_bytes: int) -> list[int]:
    """Fork the ranks and return their process ids."""
    told = server.ask(f"{directory} {first} {SIZE} {host_bytes}", first, "pids")
    return [int(pid) for pid in told.split(",")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("rank_server.py") as started:
        yield started


def assert_latest(directory: Path, at_least: int) -> int:
    targets = [Piece.whole(name, torch.zeros(240, 512), "ffn embed") for name in ("all", "cut")]
    return assert_latest_is_whole(directory, at_least, targets)


def kill_rounds(
    server: Server, directory: Path, victims: list[int], host_bytes: int, rounds: int
) -> None:
    draw, step, interrupted, seconds = random.Random(0), 0, 0, 0.05
    for _ in range(rounds):
        pids = start(server, directory, step + 1, host_bytes)
        for _ in range(1 + draw.randint(0, 1)):
            begun = time.monotonic()
            assert server.wait_for("saved")
            seconds = time.monotonic() - begun
        assert server.wait_for("ended", draw.uniform(0.0, min(seconds, 0.2))) is None
        for rank in victims:
            os.kill(pids[rank], signal.SIGKILL)
        ends = dict(server.wait_for("ended").split(":") for _ in pids)  # type: ignore[union-attr]
        for rank in range(SIZE):  # who was not killed has seen it, and did not wait for ever
            assert ends[str(rank)] == (str(int(signal.SIGKILL)) if rank in victims else "256")
        found = assert_latest(directory, at_least=server.saved)
        interrupted += any(path.name.endswith(".megatree-tmp") for path in directory.iterdir())
        step = found
    if len(victims) == SIZE:  # else rank 0 may have removed what was half written
        assert interrupted >= 1, "no kill met a save: the test sees nothing"
    assert step >= rounds
    save(directory / step_name(step + 1), [], world=ONE, extra={"step": step + 1})
    assert not list(directory.glob(".*.megatree-tmp"))


@pytest.mark.parametrize("host_bytes", [0, 4 << 20], ids=["waited for", "behind"])
@pytest.mark.parametrize("victims", VICTIMS)
def test_killed_at_random_moments_the_last_checkpoint_loads(
    server: Server, tmp_path: Path, victims: str, host_bytes: int
) -> None:
    kill_rounds(server, tmp_path / "run", VICTIMS[victims], host_bytes, rounds=3)


@pytest.mark.full
@pytest.mark.parametrize("host_bytes", [0, 3 << 14, 4 << 20], ids=["waited for", "tight", "behind"])
@pytest.mark.parametrize("victims", VICTIMS)
def test_killed_many_times(server: Server, tmp_path: Path, victims: str, host_bytes: int) -> None:
    kill_rounds(server, tmp_path / "run", VICTIMS[victims], host_bytes, rounds=30)
