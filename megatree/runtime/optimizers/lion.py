"""Lion: steps of one size, in the direction of a sign."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatree.runtime.optimizers.optimizer import (
    Buffers,
    GroupRule,
    Optimizer,
    Schedule,
    State,
    check_decays,
    check_numbers,
    value_at,
    write_copies,
    zeros,
)
from megatree.runtime.optimizers.rows import Columns, replace, sweep

CHUNK = {"cpu": 1 << 16}
"""Device type -> elements that are updated at once (elsewhere 2**22), with copies of them, which
then stay in the cache."""


def lion(
    lr: float | Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float | Schedule = 0.1,
    moments: torch.dtype = torch.float32,
) -> Optimizer:
    """Return Lion; its state is {"m"}.

    Args:
        lr: learning rate, or a function of the step; some 3 to 10 times less than for AdamW.
        betas: weight of the momentum in the direction, and its own decay.
        weight_decay: times lr, taken off the parameters; or a function of the step.
        moments: dtype of the state, float32 or bfloat16.

    Raises:
        ValueError: a number is out of range, or moments of this dtype cannot follow it.

    Reference: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.
    """
    check_numbers("lion", lr=lr, weight_decay=weight_decay)
    check_decays("lion.betas", betas, moments)
    beta1, beta2 = betas

    def init(params: Buffers, groups: Mapping[str, GroupRule] | None = None) -> State:
        return {"m": zeros(params, moments)}

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

        def signed(columns: Columns, rule: GroupRule) -> None:
            alpha = rate * rule.lr
            for target, gradient, m in _chunks(columns):
                direction = torch.lerp(gradient, m, beta1).sign_()
                keep = 1.0 - alpha * decay * rule.decay
                if found_inf is None:
                    target.mul_(keep).sub_(direction, alpha=alpha)
                    m.lerp_(gradient, 1.0 - beta2)
                else:
                    moved = (target * keep).sub_(direction, alpha=alpha)
                    replace(target, moved, found_inf)
                    replace(m, torch.lerp(m, gradient, 1.0 - beta2), found_inf)

        sweep(signed, (params, grads, state["m"]), groups, scale)
        write_copies(params, copies)

    return Optimizer(init, update)


def _chunks(columns: Columns) -> Iterator[tuple[Tensor, ...]]:
    for row in zip(*columns, strict=True):
        size = CHUNK.get(row[0].device.type, 1 << 22)
        yield from zip(*(tensor.split(size) for tensor in row), strict=True)
