"""What all heads share, laid beside what each head has of its own."""

import torch
from jaxtyping import Float
from torch import Tensor

from megatree.functional.op import op


@op("b t g k!, b t w! -> b t g c!", linear=[[0, 1]])
def beside(x: Float[Tensor, "b t g k"], shared: Float[Tensor, "b t w"]) -> Float[Tensor, "b t g c"]:
    """Append the same elements to the last dim of every head.

    Args:
        x: [b, t, g, k], of every head.
        shared: [b, t, w], of all heads.

    Returns:
        [b, t, g, k + w].
    """
    return torch.cat([x, shared.unsqueeze(2).expand(*x.shape[:3], shared.shape[-1])], dim=-1)
