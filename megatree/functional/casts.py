"""What leaves a value as it is: its dtype and where its gradient flows."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def cast(x: Shaped[Tensor, "*n"], dtype: torch.dtype) -> Shaped[Tensor, "*n"]:
    """Return the value in another dtype; the gradient comes back in the dtype of `x`."""
    return x.to(dtype)


def stop_gradient(x: Shaped[Tensor, "*n"]) -> Shaped[Tensor, "*n"]:
    """Return the value as a constant, through which no gradient flows."""
    return x.detach()
