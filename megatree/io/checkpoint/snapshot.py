"""A consistent copy of what a rank saves, taken through host memory of a bounded size."""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatree.io.checkpoint.manifest import Chunk, blocks_of
from megatree.io.checkpoint.memory import copy_bytes
from megatree.io.checkpoint.ring import Closed, Ring
from megatree.io.checkpoint.write import BLOCKS_AHEAD, NUM_THREADS, Block, Summed, summed


class _Copied(NamedTuple):
    """A block in host memory.

    Args:
        chunk: index of its chunk.
        at: its first byte in the file.
        buffer: the memory.
        event: of the device, when the copy is there.
    """

    chunk: int
    at: int
    buffer: Tensor
    event: Any


class Snapshot:
    """Blocks on their way from tensors to a file: `take` puts them in, `blocks` gives them out.

    Law: when `take` has returned, what is done to the tensors does not show in the blocks. It
    waits for `blocks` where the memory is full, and not for the device: its later work waits for
    the copies instead. `blocks` begins when `take` is done or waits, so that they do not share a
    processor before.

    Args:
        ring: the memory.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.taken_s = 0.0
        """When the copy was there, by `time.perf_counter`."""
        self._made: queue.SimpleQueue[_Copied | BaseException | None] = queue.SimpleQueue()
        self._go = threading.Event()

    def take(self, chunks: Sequence[Chunk], data: Sequence[Tensor], block_bytes: int) -> None:
        """Copy the elements of chunks, in the order of the file."""
        end: BaseException | None = None
        try:
            with _Beside(data) as beside:
                for index, (chunk, tensor) in enumerate(zip(chunks, data, strict=True)):
                    size = tensor.dtype.itemsize
                    for start, stop in blocks_of(chunk.nbytes, block_bytes):
                        if not self.ring.fits(stop - start):
                            self._go.set()
                        buffer = self.ring.take(stop - start)
                        with beside.stream(tensor):
                            copy_bytes(tensor, chunk.box, start // size, stop // size, buffer)
                        at, event = chunk.offset + start, beside.event(tensor)
                        self._made.put(_Copied(index, at, buffer, event))
        except Closed:
            pass  # the writer has failed, and says so itself
        except BaseException as error:
            end = error
            raise
        finally:
            self.taken_s = time.perf_counter()
            self._made.put(end)
            self._go.set()

    def blocks(self, chunks: Sequence[Chunk]) -> Iterator[Block]:
        """Give the blocks out: the `Source` of `write_chunks`."""
        self._go.wait()
        pending: deque[Block] = deque()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for copied in self._arriving():
                ready = pool.submit(_summed, copied.buffer, copied.event)
                pending.append(Block(copied.chunk, copied.at, ready))
                # none is kept while the next is waited for: that may wait for its memory
                while len(pending) > BLOCKS_AHEAD or (pending and self._made.empty()):
                    yield pending.popleft()
                    self.ring.give_back()
            while pending:
                yield pending.popleft()
                self.ring.give_back()

    def _arriving(self) -> Iterator[_Copied]:
        while (copied := self._made.get()) is not None:
            if isinstance(copied, BaseException):
                raise ValueError(f"the copy for this checkpoint failed: {copied}")
            yield copied


class _Beside:
    """Streams of the devices that tensors are on: their copies start after what was asked before,
    and what is asked after waits for them.
    """

    def __init__(self, data: Sequence[Tensor]) -> None:
        devices = {x.device for x in data if x.device.type == "cuda"}
        self.streams = {device: torch.cuda.Stream(device) for device in devices}

    def __enter__(self) -> "_Beside":
        for device, stream in self.streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        return self

    def __exit__(self, *error: object) -> None:
        for device, stream in self.streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def stream(self, x: Tensor) -> AbstractContextManager[Any]:
        stream = self.streams.get(x.device)
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def event(self, x: Tensor) -> Any:
        stream = self.streams.get(x.device)
        return None if stream is None else stream.record_event()


def _summed(buffer: Tensor, event: Any) -> Summed:
    if event is not None:
        event.synchronize()
    return summed(buffer.numpy().data, buffer)
