"""A consistent copy of what a rank saves, taken through host memory of a bounded size."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatree.io.checkpoint.manifest import Chunk, blocks_of
from megatree.io.checkpoint.memory import copy_bytes
from megatree.io.checkpoint.ring import Closed, Ring
from megatree.io.checkpoint.write import Block


class _Copied(NamedTuple):
    """A block in host memory.

    Args:
        chunk: index of its chunk.
        at: its first byte in the file.
        buffer: the memory.
        arrives: waits for the device that copies.
    """

    chunk: int
    at: int
    buffer: Tensor
    arrives: Callable[[], None]


class Snapshot:
    """Blocks on their way from tensors to a file: `take` puts them in, `blocks` gives them out.

    Law: what is done to the tensors after `settle` has returned does not show in the blocks, nor
    does what is asked of a device after it. `take`, in any thread, copies what the tensors are
    when the snapshot is made, in the order of the device's work; it waits for `blocks` where the
    memory is full. `blocks` begins when `take` is done or waits, so that they do not share a
    processor before.

    Args:
        ring: the memory.
        chunks: what to copy, in the order of the file.
        data: the elements of each chunk.
        block_bytes: bytes of a block.
    """

    def __init__(
        self, ring: Ring, chunks: Sequence[Chunk], data: Sequence[Tensor], block_bytes: int
    ) -> None:
        self.ring, self.chunks, self.block_bytes = ring, chunks, block_bytes
        self.stall_s = 0.0
        """Seconds that `settle` waited; who makes the snapshot adds what that took."""
        # Kept until the device's later work waits for the copies: else it could have the memory.
        self._data = data
        self._beside = _Beside(data)
        self._made: queue.SimpleQueue[_Copied | BaseException | None] = queue.SimpleQueue()
        self._go, self._taken = threading.Event(), threading.Event()

    def take(self) -> None:
        """Copy the elements; what goes wrong is raised by `blocks`."""
        end: BaseException | None = None
        try:
            with self._beside.device():
                for index, (chunk, tensor) in enumerate(zip(self.chunks, self._data, strict=True)):
                    self._copy(index, chunk, tensor)
        except Closed:
            pass  # the writer has failed, and says so itself
        except BaseException as error:
            end = error
        self._made.put(end)
        self._go.set()
        self._taken.set()

    def _copy(self, index: int, chunk: Chunk, tensor: Tensor) -> None:
        size = tensor.dtype.itemsize
        for start, stop in blocks_of(chunk.nbytes, self.block_bytes):
            if not self.ring.fits(stop - start):
                self._go.set()
            buffer = self.ring.take(stop - start)
            with self._beside.stream(tensor):
                copy_bytes(tensor, chunk.box, start // size, stop // size, buffer)
            arrives = self._beside.arrival(tensor)
            self._made.put(_Copied(index, chunk.offset + start, buffer, arrives))

    def settle(self) -> None:
        """Return when the tensors may change."""
        begun = time.perf_counter()
        self._taken.wait()
        self._beside.join()
        self._data = ()
        self.stall_s += time.perf_counter() - begun

    def blocks(self, chunks: Sequence[Chunk]) -> Iterator[Block]:
        """Give the blocks out: the `Source` of `write_chunks`."""
        self._go.wait()
        while (copied := self._made.get()) is not None:
            if isinstance(copied, BaseException):
                raise ValueError(f"the copy for this checkpoint failed: {copied}") from copied
            yield Block(copied.chunk, copied.at, partial(self._lend, copied))

    @contextmanager
    def _lend(self, copied: _Copied) -> Generator[memoryview]:
        try:
            copied.arrives()
            yield copied.buffer.numpy().data
        finally:
            self.ring.give_back(copied.buffer)


class _Beside:
    """Streams of the devices that tensors are on: their copies start after what was asked before,
    and what is asked after `join` waits for them.
    """

    def __init__(self, data: Sequence[Tensor]) -> None:
        devices = {x.device for x in data if x.device.type == "cuda"}
        self.streams = {device: torch.cuda.Stream(device) for device in devices}
        for device, stream in self.streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def join(self) -> None:
        for device, stream in self.streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def device(self) -> AbstractContextManager[Any]:
        """Work on one of them: a new thread is on the first of the machine, which may be another
        process's.
        """
        return torch.cuda.device(next(iter(self.streams))) if self.streams else nullcontext()

    def stream(self, x: Tensor) -> AbstractContextManager[Any]:
        stream = self.streams.get(x.device)
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def arrival(self, x: Tensor) -> Callable[[], None]:
        stream = self.streams.get(x.device)
        return _here if stream is None else partial(_arrive, stream.record_event(), x.device)


def _here() -> None:
    """Wait for nothing: the copy is made."""


def _arrive(event: Any, device: torch.device) -> None:
    with torch.cuda.device(device):
        event.synchronize()
