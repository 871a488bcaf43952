"""Arrays as row-major bytes at an offset of a file: what safetensors and torch archives are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box, extents, runs, volume, whole
from megatree.io.checkpoint.directory import sync
from megatree.io.formats.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where an array lies: a file and its first byte."""

    file: Path
    offset: int
    array: Array


def read_region(region: Region, box: Box) -> Tensor:
    """Return the elements of a box; memory is made for them alone.

    Raises:
        ValueError: the file ends before them.
    """
    size = region.array.dtype.itemsize
    out = torch.empty(volume(box) * size, dtype=torch.uint8)
    view, at = out.numpy().data, 0
    descriptor = os.open(region.file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        for start, stop in runs(box, whole(region.array.shape)):
            nbytes = (stop - start) * size
            _read_at(descriptor, view[at : at + nbytes], region.offset + start * size, region.file)
            at += nbytes
    finally:
        os.close(descriptor)
    return out.view(region.array.dtype).view(extents(box))


def _read_at(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(
                f"{file}: ends at byte {offset + done}, and {len(view) - done} more are needed. "
                "Copy the file anew."
            )
        done += count


class RegionWriter:
    """Writes boxes into files whose layout is known; `finish` waits for the disk.

    Args:
        regions: path -> where it goes; the files exist.
    """

    def __init__(self, regions: Mapping[str, Region]) -> None:
        self.regions = regions

    def write(self, path: str, box: Box, data: Tensor) -> None:
        """Write the elements of a box."""
        region = self.regions[path]
        size = region.array.dtype.itemsize
        assert data.dtype == region.array.dtype, f"{path}: {data.dtype} for {region.array}"
        view = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        descriptor, at = os.open(region.file, os.O_WRONLY | os.O_NOFOLLOW), 0
        try:
            for start, stop in runs(box, whole(region.array.shape)):
                nbytes = (stop - start) * size
                _write_at(descriptor, view[at : at + nbytes], region.offset + start * size)
                at += nbytes
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Wait until the files are on the disk."""
        for file in sorted({region.file for region in self.regions.values()}):
            sync(file)


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
