"""Muon: updates of matrices are orthogonalised momentum; other leaves go to another optimizer."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatree.runtime.optimizers.optimizer import (
    Buffers,
    GroupRule,
    Matrix,
    Optimizer,
    Schedule,
    State,
    check_decays,
    check_numbers,
    value_at,
    wide,
    write_copies,
    zeros,
)
from megatree.runtime.optimizers.rows import replace

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients of x, x^3 and x^5 per step, tuned for slope at 0: singular values end near 1,
between some 0.7 and 1.2."""

ENTRY = "muon"


def by_aspect(num_out: int, num_in: int) -> float:
    """Scale an orthogonal update by its shape: sqrt(max(1, out / in))."""
    return math.sqrt(max(1.0, num_out / num_in))


def like_adam(num_out: int, num_in: int) -> float:
    """Scale an orthogonal update to elements of root mean square 0.2, about those of AdamW.

    Reference: Liu et al. 2025, "Muon is scalable for LLM training", equation 4.
    """
    return 0.2 * math.sqrt(max(num_out, num_in))


def orthogonalize(
    x: Tensor, coefficients: tuple[tuple[float, float, float], ...] = QUINTIC, eps: float = 1e-7
) -> Tensor:
    """Return matrices with the singular vectors of `x` and singular values near 1.

    Every step is x -> a x + b x x^T x + c (x x^T)^2 x, after a division by the Frobenius norm.

    Args:
        x: [..., m, n], in the dtype to compute in.
        coefficients: (a, b, c) per step.
        eps: least norm to divide by.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def muon(
    lr: float | Schedule,
    *,
    others: Optimizer,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float | Schedule = 0.1,
    scale_rule: Callable[[int, int], float] = like_adam,
    coefficients: tuple[tuple[float, float, float], ...] = QUINTIC,
    compute: torch.dtype = torch.float32,
    moments: torch.dtype = torch.float32,
    rows_at_once: int = 1,
) -> Optimizer:
    """Return Muon for the matrices of every group's rule, and `others` for all other leaves.

    Its state is {"muon": momentum} beside that of `others`. If `init` is told the groups, a group
    without matrices has no momentum, and one of matrices alone nothing of `others`.

    A matrix is gathered whole, so its update is the one of a single device. Ranks that hold parts
    of a matrix do its iteration each.

    Args:
        lr: learning rate, or a function of the step.
        others: updates the leaves that are no matrices; it has a learning rate of its own.
        momentum: decay of the average of gradients.
        nesterov: whether to look ahead along the momentum.
        weight_decay: times lr, taken off the matrices; or a function of the step.
        scale_rule: (outputs, inputs) -> what multiplies an orthogonal update.
        coefficients: of the iteration, per step.
        compute: dtype of the iteration and of what is gathered (float64 for float64 parameters).
        moments: dtype of the momentum, float32 or bfloat16.
        rows_at_once: rows of a buffer (layers) per gather and batched product: more are fewer
            messages, and more memory.

    Raises:
        ValueError: a number is out of range.

    Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    check_numbers("muon", lr=lr, weight_decay=weight_decay)
    check_decays("muon.momentum", (momentum,), moments)
    if rows_at_once < 1:
        raise ValueError(f"muon.rows_at_once: {rows_at_once}. Give at least 1.")

    def init(params: Buffers, groups: Mapping[str, GroupRule] | None = None) -> State:
        with_matrices = {n: p for n, p in params.items() if groups is None or groups[n].matrices}
        rest = {
            name: p
            for name, p in params.items()
            if groups is None or _gaps(groups[name].matrices, p.shape[1])
        }
        return {ENTRY: zeros(with_matrices, moments), **others.init(rest, groups)}

    @torch.no_grad()
    def update(
        params: Buffers,
        grads: Buffers,
        state: State,
        *,
        step: int,
        groups: Mapping[str, GroupRule],
        scale: Tensor | float = 1.0,
        found_inf: Tensor | None = None,
        copies: Buffers | None = None,
    ) -> None:
        rate, decay = value_at(lr, step), value_at(weight_decay, step)

        def one(name: str, matrix: Matrix, start: int) -> None:
            rows = slice(start, start + rows_at_once)
            window = slice(matrix.start, matrix.start + math.prod(matrix.shape))
            target = params[name][rows, window]
            stored = state[ENTRY][name][rows, window]
            to = wide(target.dtype)
            gradient = grads[name][rows, window].to(to) * scale
            average = torch.lerp(gradient, stored.to(to), momentum)
            ahead = torch.lerp(gradient, average, momentum) if nesterov else average
            narrow = to if to == torch.float64 else compute
            whole = matrix.gather(ahead.to(narrow).reshape(len(target), *matrix.shape))
            flat = _as_matrices(whole, matrix)
            num_out, num_in = flat.shape[-2:] if matrix.columns_are_inputs else flat.mT.shape[-2:]
            straight = orthogonalize(flat, coefficients).reshape(whole.shape)
            direction = matrix.cut(straight).reshape(target.shape).to(to)
            alpha = rate * groups[name].lr
            moved = target.to(to) * (1.0 - alpha * decay * groups[name].decay)
            moved.sub_(direction, alpha=alpha * scale_rule(num_out, num_in))
            replace(target, moved, found_inf)
            replace(stored, average, found_inf)

        for name, param in params.items():
            for matrix in groups[name].matrices:
                for start in range(0, param.shape[0], rows_at_once):
                    one(name, matrix, start)
        columns, rules = _rest(params, grads, *_inner(state).values(), groups=groups)
        inner = dict(zip(_inner(state), columns[2:], strict=True))
        others.update(
            columns[0],
            columns[1],
            inner,
            step=step,
            groups=rules,
            scale=scale,
            found_inf=found_inf,
        )
        write_copies(params, copies)

    return Optimizer(init, update)


def _inner(state: State) -> State:
    return {entry: buffers for entry, buffers in state.items() if entry != ENTRY}


def _as_matrices(whole: Tensor, matrix: Matrix) -> Tensor:
    """Return [rows, batch, m, n] of [rows, *whole]."""
    columns = whole.dim() - matrix.num_column_dims
    batch = 1 + matrix.num_batch_dims
    assert batch < columns < whole.dim(), f"{list(whole.shape)} is no stack of matrices: {matrix}"
    shape = whole.shape
    return whole.reshape(
        shape[0],
        math.prod(shape[1:batch]),
        math.prod(shape[batch:columns]),
        math.prod(shape[columns:]),
    )


def _gaps(matrices: tuple[Matrix, ...], size: int) -> list[tuple[int, int]]:
    """Return the parts of a row that no matrix covers, as (start, stop)."""
    gaps, at = [], 0
    for matrix in sorted(matrices, key=lambda matrix: matrix.start):
        if matrix.start > at:
            gaps.append((at, matrix.start))
        at = matrix.start + math.prod(matrix.shape)
    return [*gaps, (at, size)] if at < size else gaps


def _rest(
    *columns: Buffers, groups: Mapping[str, GroupRule]
) -> tuple[list[dict[str, Tensor]], dict[str, GroupRule]]:
    """Return views of what no matrix covers, a group for every gap, and their rules."""
    cut: list[dict[str, Tensor]] = [{} for _ in columns]
    rules = {}
    for name, param in columns[0].items():
        rule = groups[name]
        for start, stop in _gaps(rule.matrices, param.shape[1]):
            part = f"{name}[{start}:{stop}]"
            rules[part] = GroupRule(lr=rule.lr, decay=rule.decay)
            for buffers, column in zip(cut, columns, strict=True):
                buffers[part] = column[name][:, start:stop]
    return cut, rules
