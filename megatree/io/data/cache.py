"""Arrays that are slow to build, kept on disk under a digest of all that decides them."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatree.io.data.atomic import atomic_write
from megatree.io.data.dataset import digest
from megatree.io.data.first_rank import on_first_rank
from megatree.io.world import World

_VISIBLE_S = 30.0  # a network file system may show a new file late


@dataclass(frozen=True, kw_only=True)
class IndexCache:
    """A folder of arrays; each is written whole, under a name that its content decides.

    Rank 0 builds what is missing and the others wait, so every rank must ask for the same arrays in
    the same order.

    Attributes:
        folder: where the arrays are; all ranks must see it.
        world: the ranks of the job.
        deadline_s: seconds that the others wait for one build.
    """

    folder: Path
    world: World = field(default_factory=World.single)
    deadline_s: float = 3600.0

    def get(
        self, what: str, key: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return the arrays of `key`, mapped from disk; build them first if they are not there.

        Args:
            what: is being built, for messages.
            key: all that decides the arrays, and a version of the algorithm; JSON values.
            build: makes the arrays.

        Raises:
            TimeoutError: rank 0 did not finish before the deadline.
            ValueError: an array on disk is damaged, or what `build` raises.
            OSError: the folder cannot be written, or a rank does not see it.
        """
        name = digest(**key)
        note = self.folder / f"{name}.json"

        def work() -> None:
            if not note.exists():
                self._write(note, name, key, build())

        on_first_rank(self.world, what, work, deadline_s=self.deadline_s)
        return self.world.agree(lambda: self._read(note, name))

    def _write(
        self, note: Path, name: str, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> None:
        for array_name, array in arrays.items():
            with atomic_write(self.folder / f"{name}.{array_name}.npy") as staged:
                np.lib.format.write_array(staged.file, np.ascontiguousarray(array))
        told = {"key": dict(key), "arrays": list(arrays)}
        with atomic_write(note) as staged:  # last: its presence says that all is there
            staged.write(json.dumps(told, indent=1).encode())

    def _read(self, note: Path, name: str) -> dict[str, np.ndarray]:
        deadline = time.monotonic() + _VISIBLE_S
        while not note.exists():
            if time.monotonic() > deadline:
                raise OSError(
                    f"{note}: rank {self.world.rank} does not see what rank 0 wrote. "
                    "Put the cache into a folder that all ranks share."
                )
            time.sleep(0.1)
        told = json.loads(note.read_text(encoding="utf-8"))
        return {
            array_name: _map_array(self.folder / f"{name}.{array_name}.npy", note)
            for array_name in told["arrays"]
        }


def _map_array(path: Path, note: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError):
        pass  # numpy cannot map an array of no elements
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}). Remove {note.name} and it is built again."
        ) from error
