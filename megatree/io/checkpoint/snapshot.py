"""A consistent copy of what a rank saves, taken through host memory of a bounded size."""

import queue
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatree.io.checkpoint.manifest import Chunk, blocks_of
from megatree.io.checkpoint.memory import copy_bytes
from megatree.io.checkpoint.ring import Closed, Ring
from megatree.io.checkpoint.write import NUM_THREADS, Block, Summed


class Snapshot:
    """Blocks on their way from tensors to a file: `take` puts them in, `blocks` gives them out.

    Law: when `take` has returned, what is done to the tensors does not show in the blocks. It
    waits for `blocks` where the memory is full, and not for the device: its later work waits for
    the copies instead.

    Args:
        ring: the memory.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.taken_s = 0.0
        """When the copy was there, by `time.perf_counter`."""
        self._made: queue.SimpleQueue[Block | BaseException | None] = queue.SimpleQueue()

    def take(self, chunks: Sequence[Chunk], data: Sequence[Tensor], block_bytes: int) -> None:
        """Copy the elements of chunks, in the order of the file."""
        try:
            with ThreadPoolExecutor(NUM_THREADS) as pool, _Beside(data) as beside:
                for index, (chunk, tensor) in enumerate(zip(chunks, data, strict=True)):
                    size = tensor.dtype.itemsize
                    for start, stop in blocks_of(chunk.nbytes, block_bytes):
                        buffer = self.ring.take(stop - start)
                        with beside.stream(tensor):
                            copy_bytes(tensor, chunk.box, start // size, stop // size, buffer)
                        ready = pool.submit(partial(_summed, buffer, beside.event(tensor)))
                        self._made.put(Block(index, chunk.offset + start, ready))
            self.taken_s = time.perf_counter()
            self._made.put(None)
        except Closed:
            return  # the writer has failed, and says so itself
        except BaseException as error:
            self._made.put(error)
            raise

    def blocks(self, chunks: Sequence[Chunk]) -> Iterator[Block]:
        """Give the blocks out: the `Source` of `write_chunks`."""
        while (block := self._made.get()) is not None:
            if isinstance(block, BaseException):
                raise ValueError(f"the copy for this checkpoint failed: {block}")
            yield block
            self.ring.give_back()


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
    view = buffer.numpy().data
    return view, zlib.crc32(view)
