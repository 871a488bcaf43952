"""Ranks as threads, and counters of the bytes that pass the operating system."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatree.io.world import World
from tests.thread_worlds import threaded_worlds


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """Run `fn(world)` on every rank; per rank what it returned, or the exception it raised."""

    def run(size: int, fn: Callable[[World], Any]) -> list[Any]:
        def outcome(world: World) -> Any:
            try:
                return fn(world)
            except Exception as error:
                return error

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(outcome, threaded_worlds(size)))

    return run


class Traffic:
    """(file, first byte, last byte + 1) of every read and write of a chunk file."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int, int]] = []
        self.written: list[tuple[int, int, int]] = []

    def clear(self) -> None:
        self.read.clear()
        self.written.clear()


@pytest.fixture(scope="module")
def traffic() -> Iterator[Traffic]:
    """Record what os.preadv and os.pwrite move; clear it before use."""
    seen, preadv, pwrite = Traffic(), os.preadv, os.pwrite

    def counted_preadv(fd: int, buffers: Any, offset: int) -> int:
        count = preadv(fd, buffers, offset)
        seen.read.append((os.fstat(fd).st_ino, offset, offset + count))
        return count

    def counted_pwrite(fd: int, data: Any, offset: int) -> int:
        count = pwrite(fd, data, offset)
        seen.written.append((os.fstat(fd).st_ino, offset, offset + count))
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counted_preadv)
        patch.setattr(os, "pwrite", counted_pwrite)
        yield seen
