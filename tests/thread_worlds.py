"""Ranks that are threads of one process, as worlds."""

import pickle
import threading
from typing import Any

from megatree.io.world import World

SECONDS = 30  # a rank that waits longer than this for the others is a hang


def threaded_worlds(size: int) -> list[World]:
    """Return the worlds of `size` ranks that meet at one barrier; values travel pickled."""
    barrier, slots = threading.Barrier(size, timeout=SECONDS), [b""] * size

    def world(rank: int) -> World:
        def meet() -> None:
            barrier.wait()

        def gather(value: Any) -> list[Any]:
            slots[rank] = pickle.dumps(value)
            barrier.wait()
            everyone = [pickle.loads(slot) for slot in slots]
            barrier.wait()
            return everyone

        return World(
            rank=rank,
            size=size,
            barrier=meet,
            gather=gather,
            broadcast=lambda value: gather(value if rank == 0 else None)[0],
        )

    return [world(rank) for rank in range(size)]
