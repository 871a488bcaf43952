"""Graph targets that need the comm of the rank they run on."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatree.parallel.comm import Axes, BodyComm, RankComm


@dataclass(frozen=True)
class Scope(Mapping[str, Axes]):
    """The labels of an op: the mesh axes that cut each, and how many zigzag chunks it lies in.

    Args:
        table: label -> mesh axes.
        chunks: label -> number of chunks, of labels that are not in natural order.
    """

    table: Mapping[str, Axes]
    chunks: Mapping[str, int]

    def __getitem__(self, label: str) -> Axes:
        return self.table[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def scoped_op(
    comm: RankComm, fn: Callable[..., Any], table: Mapping[str, Axes], *args: Any, **kwargs: Any
) -> Any:
    """Call an op that takes a comm over its signature's labels."""
    return fn(BodyComm(comm, table), *args, **kwargs)


def factory(
    comm: RankComm, fn: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Make a constant on the rank's device."""
    return fn(*args, **kwargs, device=comm.device)


def iota(
    comm: RankComm, axes: Axes, start: int, step: int, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Make one rank's slice of an arange of `length` elements that is cut over mesh axes."""
    local = length // comm.size(axes)
    first = start + comm.index(axes) * local * step
    return torch.arange(first, first + local * step, step, dtype=dtype, device=comm.device)


NEEDS_COMM: tuple[Callable[..., Any], ...] = (scoped_op, factory, iota)
