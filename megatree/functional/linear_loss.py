"""A product and its cross-entropy in one op: logits and their gradients live a chunk at a time."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatree.functional.comm import Comm
from megatree.functional.loss import IGNORE, cross_entropy
from megatree.functional.op import op
from megatree.functional.product_sums import add_matrix_product
from megatree.functional.transforms import plain
from megatree.functional.triton_kernels import has_kernels

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 29, "meta": 1 << 29}
"""Most logits of a chunk by default: what stays in a CPU's cache; what fills a GPU (1 GiB of
bf16; every chunk adds to the table's gradient once), which is what plans are made for."""

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
        chunk = _even_chunk(x.numel() // x.shape[-1], table)
    wants = tuple(torch.is_grad_enabled() and z.requires_grad for z in (x, table, weights))
    if not any(wants):
        return _form(comm, x, table, labels, weights, classes, chunk, wants)[0]
    return _formed(x, table, labels, weights, comm, classes, chunk, wants)


def _even_chunk(num_rows: int, table: Tensor) -> int:
    """Return positions per chunk such that chunks are alike, and multiples of a product's tile."""
    elements = CHUNK_ELEMENTS.get(table.device.type, CHUNK_ELEMENTS["cpu"])
    most = max(CHUNK_ROWS, elements // table.shape[0])
    even = -(-num_rows // max(1, -(-num_rows // most)))
    return -(-even // CHUNK_ROWS) * CHUNK_ROWS


@torch.compiler.disable  # it is a loop over products and kernels of its own: nothing to fuse
def _formed(*args: Any) -> Tensor:
    return _Formed.apply(*args)


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
        x, table, weights = (None if g is None else _scaled(g, grad) for g in ctx.saved_tensors)
        return x, table, None, weights, None, None, None, None


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x times a 0-d factor, rounded once: torch rounds the factor to the dtype of x first,
    and on a GPU takes three times as long as a copy.
    """
    if has_kernels(x):
        from megatree.functional.scale_kernel import scaled

        return scaled(x.contiguous(), factor)
    wide = torch.promote_types(x.dtype, factor.dtype)
    return (x.to(wide) * factor).to(x.dtype)


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
    if wants_table:
        several = chunk < len(rows)  # chunks add up in float32 or better
        summed = torch.promote_types(table.dtype, torch.float32) if several else table.dtype
        fill = torch.empty_like if len(rows) else torch.zeros_like
        grad_table = fill(table, dtype=summed, memory_format=torch.contiguous_format)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits = torch.nn.functional.linear(rows[part], table)
        factor = factors[part].masked_fill(ids[part] == IGNORE, 0.0).to(dtype)
        wants_p = grad_rows is not None or wants_table
        softmax = _by_kernel if has_kernels(logits) else _by_torch
        nll, p = softmax(comm, logits, ids[part], classes, factor if wants_p else None)
        loss += (nll * factors[part]).sum()
        if losses is not None and comm.axis_index("v") == 0:
            losses[part] = nll
        if p is None:
            continue
        if grad_rows is not None:
            torch.mm(p, table, out=grad_rows[part])
        if grad_table is not None:
            add_matrix_product(grad_table, p, rows[part], fresh=start == 0)
    return (
        loss,
        None if grad_rows is None else grad_rows.view(x.shape),
        None if grad_table is None else grad_table.to(table.dtype),
        None if losses is None else losses.view(weights.shape),
    )


def _by_kernel(
    comm: Comm, logits: Tensor, labels: Tensor, classes: int, factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Do what `_by_torch` does in two passes over the logits."""
    from megatree.functional import softmax_kernel

    start, num_real = _columns(comm, logits.shape[-1], classes)
    top, total, own = softmax_kernel.statistics(logits, labels, start=start, num_real=num_real)
    if comm.axis_size("v") > 1:
        most = comm.pmax(top, "v")
        sums = torch.stack([total * (top - most).exp(), (own - most).nan_to_num(neginf=0.0)])
        total, label = comm.psum(sums, "v").unbind()
        top = most
    else:
        label = own - top
    nll = (total.log() - label).masked_fill(labels == IGNORE, 0.0)
    if factor is None:
        return nll, None
    softmax_kernel.gradient_in_place(
        logits, labels, top, total.contiguous(), factor, start=start, num_real=num_real
    )
    return nll, logits


def _by_torch(
    comm: Comm, logits: Tensor, labels: Tensor, classes: int, factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return losses, and factor * (softmax - one-hot) in the dtype of the logits if wanted.

    Args:
        comm: over "v", along which the logits may be cut.
        logits: [n, width], used up.
        labels: [n], global.
        classes: number of columns, over all ranks, that are classes.
        factor: [n], of the gradient, 0 where the label is ignored.
    """
    narrow = logits.dtype
    logits = logits.to(torch.promote_types(narrow, torch.float32))
    start, num_real = _columns(comm, logits.shape[-1], classes)
    ignored = labels == IGNORE
    cut = comm.axis_size("v") > 1
    local = labels - start
    here = (local >= 0) & (local < num_real) if cut else ~ignored
    place = local.masked_fill(~here, 0).unsqueeze(-1)
    # Only the real columns, so that a label beyond them is out of bounds.
    own = logits[:, : num_real or 1].gather(-1, place).squeeze(-1)
    if num_real < logits.shape[-1]:
        logits[:, num_real:] = -torch.inf
    top = comm.pmax(logits.amax(-1), "v") if cut else logits.amax(-1)
    own = (own - top).masked_fill(~here, 0.0)
    p = logits.sub_(top.unsqueeze(-1)).exp_()
    total, label = p.sum(-1), own
    if cut:  # one message for both sums: the normaliser and the label's logit, which one rank has
        total, label = comm.psum(torch.stack([total, own]), "v").unbind()
    nll = (total.log() - label).masked_fill(ignored, 0.0)
    if factor is None:
        return nll, None
    p /= total.unsqueeze(-1)
    factor = factor.unsqueeze(-1)
    p *= factor
    p.scatter_add_(-1, place, torch.where(here.unsqueeze(-1), -factor, 0.0))
    return nll, p.to(narrow)


def _columns(comm: Comm, width: int, classes: int) -> tuple[int, int]:
    """Return the global number of this rank's first column, and how many are classes."""
    start = comm.axis_index("v") * width
    return start, min(max(classes - start, 0), width)
