"""Dropout by key and global element index: the same mask on any mesh."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatree.functional import keys
from megatree.functional.comm import Comm
from megatree.functional.op import op


def keep(
    comm: Comm,
    labels: tuple[str, ...],
    shape: tuple[int, ...],
    key: int | Int[Tensor, ""],
    rate: float,
    device: torch.device,
) -> Bool[Tensor, "..."]:
    """Return the local part of a mask that is False with probability `rate`.

    Args:
        comm: speaks the labels.
        labels: the label of every dim; a cut one gives the offset of the local part.
        shape: local shape.
        key: int or 0-d int64 tensor.
        rate: probability in [0, 1).
        device: where to draw.
    """
    return keys.keep_mask(key, held_index(comm, labels, shape, device), rate)


def held_index(
    comm: Comm, labels: tuple[str, ...], shape: tuple[int, ...], device: torch.device
) -> Int[Tensor, "..."]:
    """Return the global row-major index of every element that a rank holds; see `keep`."""
    sizes = tuple(n * comm.axis_size(a) for a, n in zip(labels, shape, strict=True))
    held = tuple(comm.ranges(a, n) for a, n in zip(labels, shape, strict=True))
    return _index(sizes, held, device)


def _index(
    sizes: tuple[int, ...], held: tuple[tuple[tuple[int, int], ...], ...], device: torch.device
) -> Int[Tensor, "..."]:
    """Return the global row-major index of every element that a rank holds."""
    for dim, ranges in enumerate(held):
        if len(ranges) > 1:  # a dim in zigzag order
            parts = [_index(sizes, (*held[:dim], (r,), *held[dim + 1 :]), device) for r in ranges]
            return torch.cat(parts, dim)
    return keys.box_index(sizes, tuple(ranges[0] for ranges in held), device)


def check_rate(rate: float, key: int | Tensor | None, place: str) -> None:
    """Refuse a rate outside [0, 1), and a positive one without a key."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{place}: dropout rate is {rate}. Give a rate in [0, 1).")
    if rate > 0.0 and key is None:
        raise ValueError(
            f"{place}: dropout of rate {rate} has no key. Give key=, a 0-d int64 tensor."
        )


@op("..., -> ...", linear=[[0]], comm=True)
def dropout(
    comm: Comm, x: Float[Tensor, "*n"], key: int | Int[Tensor, ""], *, rate: float
) -> Float[Tensor, "*n"]:
    """Zero elements with probability `rate` and divide the others by 1 - rate.

    Law: whether an element is kept is a function of (key, global element index) only.

    Args:
        x: any shape.
        key: 0-d int64 tensor (or int), one per call: `fold(key, layer, "attention")`.
        rate: probability in [0, 1).

    Returns:
        The shape of `x`.

    Raises:
        ValueError: the rate is outside [0, 1).

    Reference: Srivastava et al. 2014, JMLR 15, section 4.
    """
    check_rate(rate, key, "dropout")
    if rate == 0.0:
        return x
    labels = tuple(str(i) for i in range(x.dim()))
    kept = keep(comm, labels, tuple(x.shape), key, rate, x.device)
    return x * (kept.to(x.dtype) / (1.0 - rate))
