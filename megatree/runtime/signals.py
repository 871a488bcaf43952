"""A run that is asked to stop, stops after a step: the ranks agree on which."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor

from megatree.parallel.comm import RankComm


class StopRequest:
    """A context in which some signals are noted instead of obeyed; a second one changes nothing.

    Python hands signals to the main thread alone; elsewhere nothing is noted.

    Args:
        numbers: the signals.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = (signal.SIGTERM,)) -> None:
        self.numbers = numbers if threading.current_thread() is threading.main_thread() else ()
        self.got: signal.Signals | None = None
        self._before: list[tuple[signal.Signals, object]] = []

    def __enter__(self) -> "StopRequest":
        for number in self.numbers:
            self._before.append((number, signal.signal(number, self._note)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            number, handler = self._before.pop()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.got = self.got or signal.Signals(number)

    def agreed(self, comm: RankComm) -> bool:
        """Whether any rank was asked to stop; every rank calls it after the same step.

        Args:
            comm: this rank's collectives over the whole mesh.
        """
        return bool(self.vote(comm).item())

    def vote(self, comm: RankComm) -> Tensor:
        """Return 1 on the device if any rank was asked to stop, else 0; as `agreed` is called."""
        asked = torch.full((), float(self.got is not None), device=comm.device)
        axes = tuple(comm.sizes)
        return comm.pmax(asked, axes) if axes else asked
