"""Contractions: `einsum` in the letters of the package, and products with structured weights."""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Shaped
from torch import Tensor

from megatree.functional.op import op


@cache
def _compact(text: str) -> str:
    """Spell "b t d, v d -> b t v" as torch does; refuse a label that is no single letter."""
    left, arrow, right = text.partition("->")
    labels = [word for part in (*left.split(","), right) for word in part.split()]
    bad = [word for word in labels if word != "..." and not (len(word) == 1 and word.isalpha())]
    if bad or not arrow:
        what = f"{', '.join(map(repr, bad))} is no label" if bad else "there is no '->'"
        raise ValueError(
            f'einsum: {what} in {text!r}. Write single letters set apart by blanks, "b t d, v d -> b t v".'
        )
    return text.replace(" ", "")


def einsum(text: str, *xs: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Contract tensors over the labels that are not in the output.

    Args:
        text: single letters set apart by blanks, in the legend of the package: b batch, t sequence,
            s source sequence, d embed, h heads, g kv_heads, r group, k head_dim, f ffn, v vocab,
            e experts, c capacity, l layers.
        xs: one tensor per operand.

    Returns:
        The contraction.

    Raises:
        ValueError: a label is longer than a letter, or the output is missing.

    >>> einsum("t k, g k -> g t", torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([4, 2])
    """
    return torch.einsum(_compact(text), *xs)


def _linear_signature(ranks: Sequence[int]) -> str:
    rows = " ".join(f"n{i}" for i in range(ranks[1] - 1))
    return f"... d+, {rows} d+ -> ... {rows}"


@op(_linear_signature, linear=[[0], [1]])
def linear(x: Shaped[Tensor, "... d"], weight: Shaped[Tensor, "*n d"]) -> Shaped[Tensor, "..."]:
    """Contract the last dim of `x` with the last dim of an output-major weight of any rank.

    Args:
        x: [..., d].
        weight: [*n, d], for example "kv_heads group head_dim embed".

    Returns:
        [..., *n].
    """
    if weight.dim() == 2:
        return torch.nn.functional.linear(x, weight)
    if weight.dim() == 1:
        return torch.matmul(x, weight)
    return torch.nn.functional.linear(x, weight.flatten(0, -2)).unflatten(-1, weight.shape[:-1])


def project(
    x: Shaped[Tensor, "... d"], weights: Sequence[Shaped[Tensor, "..."]]
) -> tuple[Shaped[Tensor, "..."], ...]:
    """Contract `x` with several weights, as `linear` does with one.

    Args:
        x: [..., d].
        weights: each [*n, d].

    Returns:
        Per weight [..., *n].
    """
    return tuple(linear(x, weight) for weight in weights)
