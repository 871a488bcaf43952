"""A process that forks savers for test_crash.py to kill; it imports torch once for all of them.

Reads lines `directory first_step die_at` from stdin and answers on stdout, unbuffered: `pid N`,
then `saved N` after each save has returned, then `ended STATUS`. A saver saves step after step
until it is killed; with die_at > 0 it kills itself before its call number die_at to the disk.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

import torch

from megatree.io.checkpoint import Piece, save, step_name
from megatree.io.world import World

TO_DISK = ("open", "mkdir", "pwrite", "fsync", "rename", "unlink", "rmdir")


def state(step: int) -> list[Piece]:
    """Return leaves whose every element tells the step; about 1 MB in several blocks."""
    return [
        Piece.whole("w", torch.full((512, 256), float(step)), "ffn embed"),
        Piece.whole("m.w", torch.full((512, 256), float(step)).t(), "embed ffn"),
        Piece.whole("step", torch.tensor(step), ""),
    ]


def die_before_call(number: int) -> None:
    """Make the process kill itself before call `number` of the functions in TO_DISK."""
    calls = itertools.count(1)

    def deadly(fn):
        def call(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)

        return call

    for name in TO_DISK:
        setattr(os, name, deadly(getattr(os, name)))


def save_for_ever(directory: Path, first: int, die_at: int) -> None:
    if die_at:
        die_before_call(die_at)
    for step in itertools.count(first):
        save(
            directory / step_name(step),
            state(step),
            world=World.single(),
            extra={"step": step},
            block_bytes=1 << 17,
        )
        os.write(1, f"saved {step}\n".encode())


def serve() -> None:
    for line in sys.stdin:
        directory, first, die_at = line.split()
        child = os.fork()
        if child == 0:
            save_for_ever(Path(directory), int(first), int(die_at))
        os.write(1, f"pid {child}\n".encode())
        os.write(1, f"ended {os.waitpid(child, 0)[1]}\n".encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
