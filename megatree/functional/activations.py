"""Pointwise non-linearities of a feed-forward layer."""

import torch
from jaxtyping import Float
from torch import Tensor

from megatree.functional.op import op


@op("... -> ...")
def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return x * sigmoid(x)."""
    return torch.nn.functional.silu(x)


@op("..., ... -> ...", linear=[[1]])
def swiglu(gate: Float[Tensor, "*n"], up: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return silu(gate) * up.

    Reference: Shazeer 2020, arXiv:2002.05202, equation 5.
    """
    return torch.nn.functional.silu(gate) * up


@op("... -> ...")
def gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return x times the normal distribution function of x, by the error function.

    Reference: Hendrycks, Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return torch.nn.functional.gelu(x)


@op("... -> ...")
def gelu_tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return gelu(x) in its tanh approximation, the one GPT-2 was trained with."""
    return torch.nn.functional.gelu(x, approximate="tanh")


@op("... -> ...")
def squared_relu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return max(x, 0)^2.

    Reference: So et al. 2021, arXiv:2109.08668, section 4.
    """
    return torch.relu(x).square()
