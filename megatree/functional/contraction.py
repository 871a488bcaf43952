"""Contractions: `einsum` in the letters of the package, and products with structured weights."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Shaped
from torch import Tensor

from megatree.functional.op import op


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
    if torch.compiler.is_compiling():  # no typed values there, and nothing to declare
        return _contract(text.replace(" ", ""), _summed(*_labels(text)), xs)
    return _contraction(text)(*xs)


@cache
def _contraction(text: str) -> Callable[..., Tensor]:
    """Return the op that a text spells: labels that are in no output are summed."""
    operands, output = _labels(text)
    compact, summed = text.replace(" ", ""), _summed(operands, output)

    def einsum(*xs: Tensor) -> Tensor:
        return _contract(compact, summed, xs)

    einsum.__name__ = f"einsum {text!r}"
    marked = [[x if x in output else f"{x}+" for x in labels] for labels in operands]
    signature = f"{', '.join(map(' '.join, marked))} -> {' '.join(output)}"
    return op(signature, linear=[[i] for i in range(len(operands))], product=True)(einsum)


def _contract(compact: str, summed: int, xs: tuple[Tensor, ...]) -> Tensor:
    """Contract; `summed` counts the labels that one matrix product sums, see `_summed`."""
    if not summed:
        return torch.einsum(compact, *xs)
    x, weight = xs
    if weight.dim() == 2:
        return torch.matmul(x, weight)
    rows, columns = weight.shape[:summed], weight.shape[summed:]
    product = torch.matmul(x.flatten(-summed), weight.reshape(rows.numel(), columns.numel()))
    return product if len(columns) == 1 else product.unflatten(-1, columns)


def _labels(text: str) -> tuple[list[list[str]], list[str]]:
    left, arrow, right = text.partition("->")
    operands, output = [part.split() for part in left.split(",")], right.split()
    bad = [x for x in {x for part in (*operands, output) for x in part} - {"..."} if not _letter(x)]
    if bad or not arrow:
        what = f"{', '.join(map(repr, sorted(bad)))} is no label" if bad else "there is no '->'"
        raise ValueError(
            f"einsum: {what} in {text!r}. "
            "Write single letters set apart by blanks, 'b t d, v d -> b t v'."
        )
    return operands, output


def _letter(label: str) -> bool:
    return len(label) == 1 and label.isascii() and label.isalpha()


def _summed(operands: list[list[str]], output: list[str]) -> int:
    """Return the number of summed labels if one matrix product does it as the dims lie, else 0.

    torch.einsum always takes bmm: 20 of 510 ms of a step of a small model on a CPU, against mm.
    """
    if len(operands) != 2 or any("..." in labels for labels in operands):
        return 0
    x, weight = operands
    num = len([label for label in weight if label not in output])
    fits = 0 < num < len(weight) and x[-num:] == weight[:num] and output == x[:-num] + weight[num:]
    return num if fits else 0


def _linear_signature(ranks: Sequence[int]) -> str:
    rows = " ".join(f"n{i}" for i in range(ranks[1] - 1))
    return f"... d+, {rows} d+ -> ... {rows}"


@op(_linear_signature, linear=[[0], [1]], product=True)
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
