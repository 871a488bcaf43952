"""AdamW as a pair of functions over trees of tensors; the update works in place."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

Schedule = Callable[[int], float]


class Optimizer(NamedTuple):
    """A pair of functions: `init(params) -> state`, `update(params, grads, state, ...)` in place."""

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
        multiplies the gradients (clipping).

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
        rate = lr(step) if callable(lr) else lr
        correction1 = 1 - beta1 ** (step + 1)
        correction2 = 1 - beta2 ** (step + 1)
        targets = params if state["master"] is None else state["master"]
        for p, g, m, v, decays in zip(
            *(optree.tree_leaves(t) for t in (targets, grads, state["m"], state["v"], decay)),
            strict=True,
        ):
            g = g.to(m.dtype) * scale
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if decays and weight_decay:
                p.mul_(1 - rate * weight_decay)
            denominator = v.sqrt().div_(correction2**0.5).add_(eps)
            p.addcdiv_(m, denominator, value=-rate / correction1)
        if state["master"] is not None:
            for p, master in zip(
                optree.tree_leaves(params), optree.tree_leaves(targets), strict=True
            ):
                p.copy_(master)

    return Optimizer(init, update)
