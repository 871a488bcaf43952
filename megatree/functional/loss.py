"""Cross-entropy that owns the vocabulary: logits may stay cut along it."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatree.functional.comm import Comm
from megatree.functional.op import op

IGNORE = -100
"""The label of a position that has no loss."""


@op("... v@, ... -> ...", comm=True)
def cross_entropy(
    comm: Comm,
    logits: Float[Tensor, "*n v"],
    labels: Int[Tensor, "*n"],
    *,
    num_classes: int | None = None,
) -> Float[Tensor, "*n"]:
    """Return the negative log-likelihood of every label, in float32 or better.

    Logits may be cut along the vocabulary: forward takes a maximum and a sum over the ranks,
    backward nothing. Columns from `num_classes` on are padding: no probability, no gradient.

    Args:
        logits: [..., v], natural logarithms up to a constant per position.
        labels: [...], in [0, num_classes), or -100 for loss 0 and gradient 0. Any other label
            is an error on CPU if the vocabulary is not cut, and elsewhere the caller's to avoid.
        num_classes: number of classes; None takes every column.

    Returns:
        [...], nats.

    Raises:
        ValueError: there are fewer columns than classes.
        IndexError: (on CPU) a label is out of range.
    """
    columns = logits.shape[-1] * comm.axis_size("v")
    classes = columns if num_classes is None else num_classes
    if classes > columns:
        raise ValueError(
            f"cross_entropy: num_classes is {classes}, the logits have {columns} columns. "
            "Give at most as many classes as columns."
        )
    if comm.axis_size("v") > 1:
        return _CutVocabulary.apply(logits, labels, comm, classes)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = (wide if classes == columns else wide[..., :classes]).reshape(-1, classes)
    nll = torch.nn.functional.cross_entropy(
        rows, labels.reshape(-1), ignore_index=IGNORE, reduction="none"
    )
    return nll.view(labels.shape)


class _CutVocabulary(torch.autograd.Function):
    """Cross-entropy of one rank's columns; what backward needs of the others, forward has saved."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, comm: Comm, num_classes: int) -> Tensor:
        width = logits.shape[-1]
        start = comm.axis_index("v") * width
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if num_classes < width * comm.axis_size("v"):
            column = torch.arange(start, start + width, device=logits.device)
            wide = wide.masked_fill(column >= num_classes, -torch.inf)
        top = comm.pmax(wide.amax(-1), "v")
        local = labels - start
        here = (local >= 0) & (local < width)
        local = local.masked_fill(~here, 0).unsqueeze(-1)
        own = wide.gather(-1, local).squeeze(-1) - top
        p = (wide - top.unsqueeze(-1)).exp_()
        # One message for both sums: the normaliser and the label's logit, which one rank has.
        mine = torch.stack([p.sum(-1), own.masked_fill(~here, 0.0)])
        total, label = comm.psum(mine, "v").unbind()
        p /= total.unsqueeze(-1)
        ignored = labels == IGNORE
        ctx.save_for_backward(p, local, here, ignored)
        ctx.dtype = logits.dtype
        return (total.log() - label).masked_fill(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        p, local, here, ignored = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0.0)
        out = p * grad.unsqueeze(-1)
        out.scatter_add_(-1, local, -grad.masked_fill(~here, 0.0).unsqueeze(-1))
        return out.to(ctx.dtype), None, None, None
