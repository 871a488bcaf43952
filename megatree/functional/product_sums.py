"""Products of matrices that add up in place: gradients of weights."""

import torch
from torch import Tensor


def add_matrix_product(target: Tensor, left: Tensor, right: Tensor, *, fresh: bool) -> None:
    """Add `left.T @ right` to `target`, in its dtype, in place.

    On a GPU the product of bfloat16 or float16 factors adds its float32 sums as it writes them;
    elsewhere the factors are widened first, which gives the same numbers.

    Args:
        target: [rows, columns], or several such.
        left: [tokens, rows], or as many, or one for all.
        right: [tokens, columns], or as many, or one for all.
        fresh: whether to replace what is there.
    """
    several = target.dim() == 3
    if torch.promote_types(left.dtype, target.dtype) != target.dtype:
        value = left.mT @ right
        target.copy_(value) if fresh else target.add_(value)
        return
    if left.dtype == target.dtype or not (target.is_cuda and target.dtype == torch.float32):
        left, right = left.to(target.dtype), right.to(target.dtype)
        add = torch.Tensor.baddbmm_ if several else torch.Tensor.addmm_
        add(target, *_as_many(target, left, right), beta=0 if fresh else 1)
        return
    op = torch.ops.aten.baddbmm if several else torch.ops.aten.addmm
    factors = _as_many(target, left, right)
    op.dtype_out(target, *factors, target.dtype, beta=0 if fresh else 1, out=target)


def _as_many(target: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors as a product wants them: the left one transposed, as many as results."""
    many = target.shape[:-2]
    return left.mT.expand(*many, -1, -1), right.expand(*many, -1, -1)
