"""A rank, or all of them, killed at random moments of a save, in the foreground or behind it."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatree.io import world
from megatree.io.checkpoint import Piece, latest, load, load_extra, save, step_name
from megatree.io.world import World

ONE = World.single()
SIZE = 3
VICTIMS = {"rank 0": [0], "rank 2": [2], "all ranks": [0, 1, 2]}


class Server:
    """The other end of rank_server.py."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.pending, self.saved = process, b"", 0

    def start(self, directory: Path, first: int, host_bytes: int) -> list[int]:
        """Fork the ranks and return their process ids."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{directory} {first} {SIZE} {host_bytes}\n".encode())
        self.process.stdin.flush()
        pids = self.wait_for("pids")
        assert pids is not None
        return [int(pid) for pid in pids.split(",")]

    def wait_for(self, word: str, seconds: float = 60.0) -> str | None:
        """Take lines until one starts with `word`; return its value, None when time is over."""
        end = time.monotonic() + seconds
        while True:
            while b"\n" in self.pending:
                line, self.pending = self.pending.split(b"\n", 1)
                key, value = line.decode().split()
                if key == "saved":
                    self.saved = int(value)
                if key == word:
                    return value
            output = self.process.stdout
            assert output is not None
            if not select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            read = os.read(output.fileno(), 4096)
            assert read, "the server died"
            self.pending += read


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    root = Path(world.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Server(process)
        process.kill()


def assert_latest_is_whole(directory: Path, at_least: int) -> int:
    """Load what `latest` returns, compare every element with its step, and return the step."""
    path = latest(directory)
    if path is None:
        assert at_least == 0
        return 0
    step = load_extra(path)["step"]
    assert path.name == step_name(step)
    assert step >= at_least, "a save that was reported is gone"
    targets = [Piece.whole(name, torch.zeros(240, 512), "ffn embed") for name in ("all", "cut")]
    for piece in load(path, targets, world=ONE).pieces:
        assert bool((piece.tensor == step).all()), piece.path
    return step


def kill_rounds(
    server: Server, directory: Path, victims: list[int], host_bytes: int, rounds: int
) -> None:
    draw, step, interrupted, seconds = random.Random(0), 0, 0, 0.05
    for _ in range(rounds):
        pids = server.start(directory, step + 1, host_bytes)
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
        found = assert_latest_is_whole(directory, at_least=server.saved)
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
