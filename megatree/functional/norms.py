"""Normalisation over the last dim."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from megatree.functional.op import op


def _norm_signature(ranks: Sequence[int]) -> str:
    """Type x and however many of weight and bias are there."""
    return ", ".join(["... d!", *["d!"] * (len(ranks) - 1)]) + " -> ... d!"


@op(_norm_signature)
def rms_norm(
    x: Float[Tensor, "... d"], weight: Float[Tensor, " d"] | None = None, *, eps: float = 1e-5
) -> Float[Tensor, "... d"]:
    """Divide by the root mean square of the last dim: x / sqrt(mean(x^2) + eps) * weight.

    The mean is taken in float32 or better, whatever the dtype of `x`.

    Args:
        x: [..., d].
        weight: [d]; None is a weight of ones.
        eps: added to the mean square.

    Returns:
        [..., d], of the dtype of `x`.

    Reference: Zhang, Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (out if weight is None else out * weight).to(x.dtype)


@op(_norm_signature)
def layer_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "... d"]:
    """Subtract the mean of the last dim and divide by its standard deviation.

    Args:
        x: [..., d].
        weight: [d]; None is a weight of ones.
        bias: [d]; None is a bias of zeros.
        eps: added to the variance.

    Returns:
        [..., d], of the dtype of `x`.

    Reference: Ba, Kiros, Hinton 2016, arXiv:1607.06450, equation 4.
    """
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
