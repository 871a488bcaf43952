"""Elements of a tensor as bytes: a range of a box, copied only if it does not lie contiguous."""

import sys
from collections import deque
from math import prod

import numpy as np
import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, elements, extents, intersect, slices

assert sys.byteorder == "little", "chunk files are little-endian and are written as memory is"


def memory(data: Tensor) -> memoryview | None:
    """Return the bytes of a tensor without a copy; None if they are not in row-major CPU memory."""
    if data.device.type != "cpu" or not data.is_contiguous() or data.is_conj() or data.is_neg():
        return None
    return data.detach().reshape(-1).view(torch.uint8).numpy().data


class Scratch:
    """Memory for blocks, used again and again: the first use of a page takes as long as its copy.

    As many blocks are made as are in use at once.
    """

    def __init__(self) -> None:
        self._free: deque[Tensor] = deque()

    def take(self, nbytes: int) -> Tensor:
        """Return bytes that nobody else has."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        if buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        return buffer[:nbytes]

    def give_back(self, buffer: Tensor) -> None:
        """Return what `take` gave."""
        self._free.append(torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage()))


def copy_bytes(data: Tensor, box: Box, start: int, stop: int, buffer: Tensor) -> None:
    """Copy elements `start` to `stop` of `box` into bytes; from a device without waiting for it,
    if those are pinned.
    """
    goes_on = data.device.type != "cpu" and buffer.is_pinned()
    size = data.dtype.itemsize
    if (view := memory(data)) is not None:
        # one thread, whatever torch uses: it may run beside a training step
        np.copyto(buffer.numpy(), np.frombuffer(view[start * size : stop * size], np.uint8))
        return
    if data.is_contiguous() and not data.is_conj() and not data.is_neg():
        raw = data.detach().reshape(-1).view(torch.uint8)
        buffer.copy_(raw[start * size : stop * size], non_blocking=goes_on)
        return
    at = 0
    for part in elements(box, start, stop):
        count = prod(extents(part)) * data.dtype.itemsize
        into = buffer[at : at + count].view(data.dtype).view(extents(part))
        into.copy_(data.detach()[slices(part, box)], non_blocking=goes_on)
        at += count


def scatter_bytes(
    buffer: Tensor, chunk: Box, start: int, stop: int, data: Tensor, box: Box, wanted: Box
) -> None:
    """Copy what elements `start` to `stop` of `chunk` have of `wanted` into `data`, box `box`."""
    at = 0
    for part in elements(chunk, start, stop):
        count = prod(extents(part)) * data.dtype.itemsize
        common = intersect(part, wanted)
        if common is not None:
            values = buffer[at : at + count].view(data.dtype).view(extents(part))
            data.detach()[slices(common, box)].copy_(values[slices(common, part)])
        at += count
