"""Where documents stand: the file and the line of each, compactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """The places of documents, in the order of the inputs.

    Attributes:
        inputs: names of the files.
        files: number of the input of each document.
        lines: number of the line of each, rising within a file.
    """

    inputs: tuple[str, ...]
    files: Int32[np.ndarray, " n"]
    lines: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.lines)

    def only(self, chosen: Bool[np.ndarray, " n"]) -> "Places":
        """Return some of them."""
        return Places(inputs=self.inputs, files=self.files[chosen], lines=self.lines[chosen])

    def name(self, document: int) -> tuple[str, int]:
        """Return the file and the line of a document."""
        return self.inputs[self.files[document]], int(self.lines[document])

    @cached_property
    def _by_file(self) -> dict[str, np.ndarray]:
        return {name: self.lines[self.files == number] for number, name in enumerate(self.inputs)}

    def between(self, file: str, first: int, last: int) -> frozenset[int]:
        """Return the lines of a file that are in `first` to `last`, both included."""
        lines = self._by_file[file]
        start, stop = np.searchsorted(lines, [first, last + 1])
        return frozenset(lines[start:stop].tolist())


class PlacesBuilder:
    """Collects places block by block."""

    def __init__(self, inputs: Sequence[Path]) -> None:
        self._numbers = {str(path): number for number, path in enumerate(inputs)}
        self._files = [np.zeros(0, np.int32)]
        self._lines = [np.zeros(0, np.int64)]

    def add(self, file: str, lines: Sequence[int]) -> None:
        """Add the documents of a block."""
        self._files.append(np.full(len(lines), self._numbers[file], np.int32))
        self._lines.append(np.array(lines, np.int64))

    def build(self) -> Places:
        """Return all places so far."""
        return Places(
            inputs=tuple(self._numbers),
            files=np.concatenate(self._files),
            lines=np.concatenate(self._lines),
        )
