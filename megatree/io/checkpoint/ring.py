"""Host memory of a fixed size that is handed out and given back in the same order."""

import threading
from collections import deque

import torch
from torch import Tensor

from megatree.io.checkpoint.manifest import ALIGNMENT


class Closed(Exception):  # noqa: N818 (it says what happened)
    """Nobody will give memory back any more."""


class Ring:
    """Bytes of the host; one thread takes, another gives back.

    Args:
        nbytes: how many; rounded up to whole cache lines.
        pinned: whether a device copies to them by itself.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self.buffer = torch.empty(_aligned(nbytes), dtype=torch.uint8, pin_memory=pinned)
        self.most = 0
        """Most bytes that were in use at once."""
        self._ends: deque[int] = deque()  # of what is in use, oldest first
        self._head = self._tail = 0  # bytes ever taken and given back, gaps at the end included
        self._changed = threading.Condition()
        self._closed = False

    @property
    def nbytes(self) -> int:
        """The size."""
        return self.buffer.numel()

    @property
    def closed(self) -> bool:
        """Whether nothing can be taken any more."""
        return self._closed

    def take(self, nbytes: int) -> Tensor:
        """Return so many bytes, at most all; waits for room.

        Raises:
            Closed: there will be none.
        """
        with self._changed:
            assert nbytes <= self.nbytes, "a block is larger than the ring"
            self._changed.wait_for(lambda: self._closed or self.fits(nbytes))
            if self._closed:
                raise Closed
            if not self._ends:
                self._head = self._tail = 0
            start = self._start(nbytes)
            self._head = start + _aligned(nbytes)
            self._ends.append(self._head)
            self.most = max(self.most, self._head - self._tail)
            at = start % self.nbytes
            return self.buffer[at : at + nbytes]

    def give_back(self) -> None:
        """Return the bytes that were taken first."""
        with self._changed:
            self._tail = self._ends.popleft()
            self._changed.notify_all()

    def close(self) -> None:
        """Let whoever waits for room go away."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _start(self, nbytes: int) -> int:
        """Return where the next bytes begin: nothing is cut in two by the end of the memory."""
        left = -self._head % self.nbytes
        return self._head + (left if nbytes > left else 0) if left else self._head

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes could be taken without waiting."""
        return not self._ends or self._start(nbytes) + nbytes - self._tail <= self.nbytes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
