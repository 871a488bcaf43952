"""Megatron's real outputs, pairs written on the spot, and ranks as threads."""

import json
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatree.io.data import IndexedFile, IndexedWriter
from megatree.io.world import World

SECONDS = 30  # a rank that waits longer than this for the others is a hang


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """Megatron's outputs and the parameters that made them."""

    folder: Path
    parameters: dict[str, Any]

    def pair(self, name: str) -> Path:
        return self.folder / "data" / name

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as file:
            return dict(file)


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Goldens:
    folder = shared / "goldens"
    if not folder.is_dir():
        pytest.skip(f"missing data: {folder} is no folder. Copy the goldens there.")
    text = (folder / "datasets.json").read_text(encoding="utf-8")
    return Goldens(folder=folder, parameters=json.loads(text))


class Counting:
    """Sequences in memory whose ids count up over all of them, so that each names its place."""

    prefix = "counting"
    dtype = np.dtype(np.int32)

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.array(lengths, np.int32)
        self.documents = np.arange(len(lengths) + 1)
        self.read = 0

    @property
    def identity(self) -> str:
        return f"counting {self.lengths.tolist()}"

    def __getitem__(self, sequence: int) -> np.ndarray:
        start = int(self.lengths[:sequence].sum())
        return np.arange(start, start + self.lengths[sequence])

    def starts(self, sequences: np.ndarray) -> np.ndarray:
        return (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)[sequences]

    def take(self, places: np.ndarray) -> np.ndarray:
        self.read += places.size
        return places.astype(self.dtype)

    def verify(self) -> None:
        pass


@pytest.fixture(scope="session")
def counting() -> type[Counting]:
    return Counting


@pytest.fixture(scope="session")
def write_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., IndexedFile]:
    """Write a pair whose token ids count up over the whole file, so that each names its place."""

    def write(
        lengths: Sequence[int], *, documents: Sequence[int] | None = None, dtype: Any = np.int32
    ) -> IndexedFile:
        prefix = tmp_path_factory.mktemp("pair") / "pair"
        with IndexedWriter(prefix, dtype) as writer:
            writer.add_documents(
                np.arange(sum(lengths)),
                np.array(lengths, np.int64),
                np.array([1] * len(lengths) if documents is None else documents, np.int64),
            )
        return IndexedFile(prefix)

    return write


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """Run `fn(world)` on every rank; per rank what it returned, or the exception it raised."""

    def run(size: int, fn: Callable[[World], Any]) -> list[Any]:
        barrier, slots = threading.Barrier(size, timeout=SECONDS), [b""] * size

        def meet() -> None:
            barrier.wait()

        def world(rank: int) -> World:
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

        def outcome(rank: int) -> Any:
            try:
                return fn(world(rank))
            except Exception as error:
                return error

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(outcome, range(size)))

    return run
