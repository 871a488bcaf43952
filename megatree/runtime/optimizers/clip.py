"""Clipping gradients by value, element by element."""

import torch
from torch import Tensor

from megatree.runtime.optimizers.optimizer import Buffers


@torch.no_grad()
def clip_value(grads: Buffers, largest: float | Tensor) -> None:
    """Move every element of the gradients into [-largest, largest], in place.

    NaN stays, but infinities do not: look for overflow, and compute a norm to report, before.

    Args:
        grads: group name -> buffer.
        largest: bound of the absolute value, in the units of the buffers: times the loss scale, if
            there is one. A scalar tensor is not waited for.

    Raises:
        ValueError: the bound is a number, and not positive.
    """
    if isinstance(largest, Tensor):
        for grad in grads.values():
            bound = largest.to(grad.dtype)
            grad.clamp_(-bound, bound)
        return
    if not largest > 0.0:
        raise ValueError(f"clip_value: no element is within {largest}. Give a positive bound.")
    for grad in grads.values():
        grad.clamp_(-largest, largest)
