"""Arrays in memory as a format, and what a format gives back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatree.io.checkpoint import Box
from megatree.io.checkpoint.box import volume, whole
from megatree.io.formats.arrays import Array, Reader


class InMemory:
    """A reader of whole tensors that notes how many elements were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.arrays = {
            path: Array(shape=tuple(x.shape), dtype=x.dtype) for path, x in tensors.items()
        }
        self.largest = 0

    def read(self, path: str, box: Box) -> Tensor:
        self.largest = max(self.largest, volume(box))
        return self.tensors[path][tuple(slice(*edge) for edge in box)]


def all_of(reader: Reader) -> dict[str, Tensor]:
    """Return every array, whole."""
    return {path: reader.read(path, whole(array.shape)) for path, array in reader.arrays.items()}


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless both hold the same names and bits."""
    assert sorted(got) == sorted(expected)
    wrong = [
        path
        for path, x in expected.items()
        if got[path].dtype != x.dtype
        or got[path].shape != x.shape
        or not torch.equal(_bits(got[path]), _bits(x))
    ]
    assert not wrong


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def samples() -> dict[str, Tensor]:
    """Return tensors of several ranks and dtypes; one is all zeros, one has no element."""
    generator = torch.Generator().manual_seed(1)
    return {
        "params.a": torch.randn(5, 3, 4, generator=generator).to(torch.bfloat16),
        "params.b.c": torch.randn(7, 6, generator=generator),
        "params.zero": torch.zeros(4, 4, dtype=torch.float64),
        "params.none": torch.zeros(0, 4),
        "opt.count": torch.tensor(20),
    }
