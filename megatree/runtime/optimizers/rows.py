"""How optimizers walk over buffers: rows that are alike in one call, narrow ones one by one."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatree.runtime.optimizers.optimizer import Buffers, GroupRule, wide

Columns = list[list[Tensor]]
"""Parameters, gradients and state entries, each a list of equal length."""


LANE = 16
"""Elements in a widest vector of a CPU (64 bytes of float32)."""


def sweep(
    kernel: Callable[[Columns, GroupRule], None],
    columns: tuple[Buffers, ...],
    groups: Mapping[str, GroupRule],
    scale: Tensor | float,
) -> None:
    """Call `kernel` until every element of the buffers was in one call; it works in place.

    What it gets is flat, dense and in the wide dtype, with gradients that are already scaled. All
    that needs no copy for this, and has equal multipliers, is one call, and so one pass over
    memory; rows that must be widened are a call each, so that one row at a time exists twice.

    Law: the update of an element does not depend on where in which buffer it lies, to the last
    bit, so neither does training on how the buffers are cut.

    Args:
        kernel: gets columns and a rule, of which it may use the multipliers.
        columns: parameters, gradients, and state entries.
        groups: group name -> rule.
        scale: multiplies the gradients.
    """
    alike: dict[tuple[float, float, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for name, param in columns[0].items():
        rule, buffers = groups[name], [column[name] for column in columns]
        to = wide(param.dtype)
        if all(buffer.dtype == to for buffer in buffers):
            alike.setdefault((rule.lr, rule.decay, to), []).extend(dense(buffers))
            continue
        for row in zip(*(buffer.unbind(0) for buffer in buffers), strict=True):
            copies = tuple(tensor.to(to) for tensor in row)
            _call(kernel, [copies], rule, scale)
            _write_back(row, copies)
    for (lr, decay, _), rows in alike.items():
        _call(kernel, rows, GroupRule(lr=lr, decay=decay), scale)


def dense(buffers: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return whole buffers where all are dense, else their rows; fused kernels ignore strides."""
    if all(buffer.is_contiguous() for buffer in buffers):
        return [tuple(buffer.view(-1) for buffer in buffers)]
    return list(zip(*(buffer.unbind(0) for buffer in buffers), strict=True))


def _call(
    kernel: Callable[[Columns, GroupRule], None],
    rows: list[tuple[Tensor, ...]],
    rule: GroupRule,
    scale: Tensor | float,
) -> None:
    """Scale the gradients of rows and call the kernel, with what fills no vector in padded copies.

    Fused kernels of torch 2.13 for CPUs round the last numel % vector width elements differently.
    """
    bodies, tails, padded = rows, [], []
    if rows[0][0].device.type == "cpu":
        ends = [len(row[0]) // LANE * LANE for row in rows]
        bodies = [tuple(t[:end] for t in row) for row, end in zip(rows, ends, strict=True) if end]
        tails = [
            tuple(t[end:] for t in row)
            for row, end in zip(rows, ends, strict=True)
            if end < len(row[0])
        ]
        padded = [tuple(pad(t, (0, LANE - len(t))) for t in tail) for tail in tails]
    together = [list(column) for column in zip(*bodies, *padded, strict=True)]
    if not together:
        return
    # Not grad_scale= of the fused kernels: it divides, by a float32, which is no law for float64.
    if isinstance(scale, Tensor) or scale != 1.0:
        torch._foreach_mul_(together[1], scale)
    kernel(together, rule)
    for tail, copies in zip(tails, padded, strict=True):
        _write_back(tail, tuple(copy[: len(tail[0])] for copy in copies))


def _write_back(row: tuple[Tensor, ...], copies: tuple[Tensor, ...]) -> None:
    """Write copies of a row into it, the gradient's apart."""
    for i, (tensor, copy) in enumerate(zip(row, copies, strict=True)):
        if i != 1 and copy is not tensor:
            tensor.copy_(copy)


def replace(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Write `value` into `target`, unless `found_inf` is 1: then `target` keeps every bit."""
    kept = (
        value if found_inf is None else torch.where(found_inf != 0, target.to(value.dtype), value)
    )
    target.copy_(kept)
