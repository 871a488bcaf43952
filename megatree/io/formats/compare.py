"""How far two arrays are apart, a box of each in memory at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box
from megatree.io.formats.arrays import BOX_BYTES, Array, grid


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How two arrays differ.

    Args:
        count: elements whose bits differ.
        of: elements there are.
        most: largest difference of an element; inf where one is no number.
    """

    count: int
    of: int
    most: float

    def __str__(self) -> str:
        return f"{self.count} of {self.of} elements differ, by {self.most:.3g} at most"


def gap(
    array: Array,
    first: Callable[[Box], Tensor],
    second: Callable[[Box], Tensor],
    most_bytes: int = BOX_BYTES,
) -> Gap:
    """Compare two arrays of one declaration.

    Args:
        array: shape and dtype of both.
        first, second: box -> elements.
        most_bytes: bytes of a box.
    """
    count, of, most = 0, 0, 0.0
    for box in grid(array, most_bytes):
        one, two = first(box), second(box)
        of += one.numel()
        if torch.equal(_bytes(one), _bytes(two)):
            continue
        count += int((_bytes(one) != _bytes(two)).view(one.numel(), -1).any(dim=1).sum())
        apart = (one.to(torch.float64) - two.to(torch.float64)).abs().nan_to_num(nan=torch.inf)
        most = max(most, float(apart.max()))
    return Gap(count=count, of=of, most=most)


def _bytes(data: Tensor) -> Tensor:
    return data.contiguous().reshape(-1).view(torch.uint8)
