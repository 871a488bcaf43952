"""A product and its cross-entropy in one op: logits and their gradients live a chunk at a time."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatree.functional.comm import Comm
from megatree.functional.loss import IGNORE, cross_entropy
from megatree.functional.op import op
from megatree.functional.transforms import plain

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}
"""Logits of a chunk by default: what stays in a CPU's cache; what fills a GPU (256 MiB of bf16)."""

CHUNK_ROWS = 128
"""Fewest positions of a chunk by default: every chunk reads and writes the table's gradient."""


@op("...+ d!, v@+ d!, ...+, ...+ -> ", comm=True)
def linear_cross_entropy(
    comm: Comm,
    x: Float[Tensor, "*n d"],
    table: Float[Tensor, "v d"],
    labels: Int[Tensor, "*n"],
    weights: Float[Tensor, "*n"],
    *,
    num_classes: int | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Return the weighted sum of the cross-entropies of `linear(x, table)`, in float32 or better.

    The same as `(cross_entropy(linear(x, table), labels) * weights).sum()`, but logits exist for
    `chunk` positions at a time: the forward forms the gradients of `x` and `table` too and keeps
    those. The table may be cut along the vocabulary: two small messages per chunk.

    Args:
        x: [..., d].
        table: [v, d]; rows from `num_classes` on are padding: no probability, no gradient.
        labels: [...], in [0, num_classes), or -100 for loss 0 and gradient 0. Any other label is
            an error on CPU if the vocabulary is not cut, and elsewhere the caller's to avoid.
        weights: [...], of every position.
        num_classes: number of classes; None takes every row of the table.
        chunk: positions per chunk; None for a number that fits the device.

    Returns:
        The sum, in nats.

    Raises:
        ValueError: the table has fewer rows than there are classes, or a chunk no position.
        RuntimeError: (on CPU) a label is out of range.
    """
    rows = table.shape[0] * comm.axis_size("v")
    classes = rows if num_classes is None else num_classes
    if classes > rows:
        raise ValueError(
            f"linear_cross_entropy: num_classes is {classes}, the table has {rows} rows. "
            "Give at most as many classes as rows."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk is {chunk}. Give at least 1, or None.")
    if not (torch.compiler.is_compiling() or plain(x, table, weights)):
        logits = torch.nn.functional.linear(x, table)  # nothing is formed ahead for torch.func
        nll = cross_entropy.rule.fn(comm, logits, labels, num_classes=classes)  # type: ignore[attr-defined]
        return (nll * weights).sum()
    if chunk is None:
        most = CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cpu"])
        chunk = max(CHUNK_ROWS, most // table.shape[0])
    wants = tuple(torch.is_grad_enabled() and z.requires_grad for z in (x, table, weights))
    if not any(wants):
        return _form(comm, x, table, labels, weights, classes, chunk, wants)[0]
    return _Formed.apply(x, table, labels, weights, comm, classes, chunk, wants)


class _Formed(torch.autograd.Function):
    """The loss; its backward scales the gradients that the forward has formed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        labels: Tensor,
        weights: Tensor,
        comm: Comm,
        classes: int,
        chunk: int,
        wants: tuple[bool, ...],
    ) -> Tensor:
        loss, *grads = _form(comm, x, table, labels, weights, classes, chunk, wants)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, table, weights = (None if g is None else g * grad for g in ctx.saved_tensors)
        return x, table, None, weights, None, None, None, None


def _form(
    comm: Comm,
    x: Tensor,
    table: Tensor,
    labels: Tensor,
    weights: Tensor,
    classes: int,
    chunk: int,
    wants: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss of one rank's rows of the table, and its gradients as far as wanted.

    Those of `x` and `weights` are terms of a sum over the ranks along the vocabulary.
    """
    wants_x, wants_table, wants_weights = wants
    rows, ids, factors = x.reshape(-1, x.shape[-1]), labels.reshape(-1), weights.reshape(-1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    loss = torch.zeros((), dtype=torch.promote_types(dtype, weights.dtype), device=x.device)
    grad_rows = torch.empty_like(rows) if wants_x else None
    losses = torch.zeros_like(factors) if wants_weights else None
    grad_table: Tensor | None = None
    several = chunk < len(rows)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits = torch.nn.functional.linear(rows[part], table)
        nll, p, label = _probabilities(comm, logits.to(dtype), ids[part], classes)
        loss += (nll * factors[part]).sum()
        if losses is not None and comm.axis_index("v") == 0:
            losses[part] = nll
        if grad_rows is None and not wants_table:
            continue
        factor = factors[part].masked_fill(ids[part] == IGNORE, 0.0).to(dtype).unsqueeze(-1)
        p *= factor
        p.scatter_add_(-1, label.place, torch.where(label.here, -factor, 0.0))
        p = p.to(table.dtype)
        if grad_rows is not None:
            torch.mm(p, table, out=grad_rows[part])
        if wants_table:
            grad_table = _add_product(grad_table, p.t(), rows[part], wide=several)
    if wants_table:
        if grad_table is None:  # there is no position
            grad_table = torch.zeros_like(table)
        grad_table = grad_table.to(table.dtype)
    return (
        loss,
        None if grad_rows is None else grad_rows.view(x.shape),
        grad_table,
        None if losses is None else losses.view(weights.shape),
    )


class _Label(NamedTuple):
    """Where labels are among a rank's columns, and whether they are there."""

    place: Tensor
    here: Tensor


def _probabilities(
    comm: Comm, logits: Tensor, labels: Tensor, classes: int
) -> tuple[Tensor, Tensor, _Label]:
    """Return losses, probabilities (in the memory of the wide logits) and the labels' places."""
    width = logits.shape[-1]
    start = comm.axis_index("v") * width
    num_real = min(max(classes - start, 0), width)
    ignored = labels == IGNORE
    cut = comm.axis_size("v") > 1
    local = labels - start
    here = (local >= 0) & (local < num_real) if cut else ~ignored
    place = local.masked_fill(~here, 0).unsqueeze(-1)
    # Only the real columns, so that a label beyond them is out of bounds.
    own = logits[:, : num_real or 1].gather(-1, place).squeeze(-1)
    if num_real < width:
        logits[:, num_real:] = -torch.inf
    top = comm.pmax(logits.amax(-1), "v") if cut else logits.amax(-1)
    own = (own - top).masked_fill(~here, 0.0)
    p = logits.sub_(top.unsqueeze(-1)).exp_()
    total, label = p.sum(-1), own
    if cut:  # one message for both sums: the normaliser and the label's logit, which one rank has
        total, label = comm.psum(torch.stack([total, own]), "v").unbind()
    p /= total.unsqueeze(-1)
    nll = (total.log() - label).masked_fill(ignored, 0.0)
    return nll, p, _Label(place, here.unsqueeze(-1))


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, *, wide: bool) -> Tensor:
    """Return total + left @ right, in float32 if it is wide; `total` is used up."""
    narrow = left.dtype.itemsize < 4
    if not (wide and narrow):
        return left @ right if total is None else total.addmm_(left, right)
    if left.device.type == "cuda":  # the product itself accumulates in float32
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32)
    left, right = left.float(), right.float()
    return left @ right if total is None else total.addmm_(left, right)
