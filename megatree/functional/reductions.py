"""Sums, orders and distributions along dims, with dims by keyword."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def sum(  # noqa: A001
    x: Shaped[Tensor, "..."], *, dim: int | tuple[int, ...] | None = None, keepdim: bool = False
) -> Shaped[Tensor, "..."]:
    """Sum over dims (all of them by default)."""
    return torch.sum(x, dim=dim, keepdim=keepdim)


def mean(
    x: Float[Tensor, "..."], *, dim: int | tuple[int, ...] | None = None, keepdim: bool = False
) -> Float[Tensor, "..."]:
    """Average over dims (all of them by default); the count is the global one on any mesh."""
    return torch.mean(x, dim=dim, keepdim=keepdim)


def cumsum(x: Shaped[Tensor, "*n"], *, dim: int = -1) -> Shaped[Tensor, "*n"]:
    """Sum everything up to and with an element, along a dim."""
    return torch.cumsum(x, dim=dim)


def softmax(x: Float[Tensor, "*n"], *, dim: int = -1) -> Float[Tensor, "*n"]:
    """Return exp(x) / sum(exp(x)) along a dim."""
    return torch.softmax(x, dim=dim)


def log_softmax(x: Float[Tensor, "*n"], *, dim: int = -1) -> Float[Tensor, "*n"]:
    """Return x - log(sum(exp(x))) along a dim."""
    return torch.log_softmax(x, dim=dim)


def top_k(
    x: Shaped[Tensor, "..."], k: int, *, dim: int = -1
) -> tuple[Shaped[Tensor, "..."], Int[Tensor, "..."]]:
    """Return the k largest values along a dim, largest first, and where they are.

    >>> [t.tolist() for t in top_k(torch.tensor([1.0, 3.0, 2.0]), 2)]
    [[3.0, 2.0], [1, 2]]
    """
    values, indices = torch.topk(x, k, dim=dim)
    return values, indices
