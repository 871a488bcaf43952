"""Run an op on two halves of its operands, with a comm of two threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatree.functional.comm import Single

WORLD = 2


@dataclass
class _Meeting:
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(WORLD, timeout=20))
    values: list[Any] = field(default_factory=lambda: [None] * WORLD)
    count: int = 0


class Half(Single):
    """The comm of one of two ranks along one label; other labels are whole."""

    def __init__(self, axis: str, rank: int, meeting: _Meeting) -> None:
        self.axis, self.rank, self.meeting = axis, rank, meeting

    def axis_size(self, axis: str) -> int:
        return WORLD if axis == self.axis else 1

    def axis_index(self, axis: str) -> int:
        return self.rank if axis == self.axis else 0

    def _exchange(self, x: Tensor, axis: str) -> list[Tensor]:
        assert axis == self.axis
        self.meeting.values[self.rank] = x.detach()
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.count += self.rank == 0
        self.meeting.barrier.wait()
        return values

    def psum(self, x: Tensor, axis: str) -> Tensor:
        first, second = self._exchange(x, axis)
        return first + second

    def pmax(self, x: Tensor, axis: str) -> Tensor:
        first, second = self._exchange(x, axis)
        return first.maximum(second)


def local_form(op: Any) -> Callable[..., Any]:
    """Return the function that an op runs on local tensors, `comm` first."""
    return op.rule.fn


def on_halves(axis: str, body: Callable[[Half], Any]) -> tuple[list[Any], int]:
    """Return what `body(comm)` returns on both ranks, and the number of collectives."""
    meeting = _Meeting()
    with ThreadPoolExecutor(WORLD) as pool:
        results = list(pool.map(lambda rank: body(Half(axis, rank, meeting)), range(WORLD)))
    return results, meeting.count
