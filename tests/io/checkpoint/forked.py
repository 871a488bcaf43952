"""A process that forks savers on request, from the side of the test that kills them."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatree.io import world
from megatree.io.checkpoint import Piece, latest, load, load_extra, step_name


class Server:
    """The other end of crash_server.py or rank_server.py."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.pending, self.saved = process, b"", 0

    def ask(self, words: str, first: int, answer: str) -> str:
        """Ask for savers whose first step is `first`; return the word of their answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n".encode())
        self.process.stdin.flush()
        self.saved = first - 1
        told = self.wait_for(answer)
        assert told is not None
        return told

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


@contextmanager
def serving(script: str) -> Generator[Server]:
    """Run a script of this folder as a server, until the block ends."""
    root = Path(world.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Server(process)
        process.kill()


def assert_latest_is_whole(directory: Path, at_least: int, targets: Sequence[Piece]) -> int:
    """Load what `latest` returns, compare every element with its step, and return the step.

    Args:
        directory: of the checkpoints.
        at_least: the last step of which a save was reported.
        targets: what to load.
    """
    path = latest(directory)
    if path is None:
        assert at_least == 0
        return 0
    step = load_extra(path)["step"]
    assert path.name == step_name(step)
    assert step >= at_least, "a save that was reported is gone"
    for piece in load(path, targets, world=world.World.single()).pieces:
        assert bool((piece.tensor == step).all()), piece.path
    return step
