"""Stochastic gradient descent, with momentum."""

from collections.abc import Mapping

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
from megatree.runtime.optimizers.rows import Columns, sweep


def sgd(
    lr: float | Schedule,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | Schedule = 0.0,
    moments: torch.dtype = torch.float32,
) -> Optimizer:
    """Return SGD; its state is {"momentum"}, or empty without momentum.

    Weight decay is the gradient of an L2 penalty here, so momentum averages it too.

    Args:
        lr: learning rate, or a function of the step.
        momentum: decay of the sum of gradients.
        nesterov: whether to look ahead along the momentum.
        weight_decay: times the parameters, added to the gradients; or a function of the step.
        moments: dtype of the momentum, float32 or bfloat16.

    Raises:
        ValueError: a number is out of range, or nesterov has no momentum.

    Reference: Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning", section 2.
    """
    check_numbers("sgd", lr=lr, weight_decay=weight_decay)
    check_decays("sgd.momentum", (momentum,), moments)
    if nesterov and not momentum:
        raise ValueError("sgd.nesterov: momentum is 0. Set momentum to 0.9, say.")

    def init(params: Buffers, groups: Mapping[str, GroupRule] | None = None) -> State:
        return {"momentum": zeros(params, moments)} if momentum else {}

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

        def fused(columns: Columns, rule: GroupRule) -> None:
            targets, gradients, *sums = columns
            torch._fused_sgd_(
                targets,
                gradients,
                sums[0] if sums else [],
                weight_decay=decay * rule.decay,
                momentum=momentum,
                lr=rate * rule.lr,
                dampening=0.0,
                nesterov=nesterov,
                maximize=False,
                # A sum that starts as zero needs no first step of its own.
                is_first_step=False,
                found_inf=found_inf,
            )

        sums = (state["momentum"],) if momentum else ()
        sweep(fused, (params, grads, *sums), groups, scale)
        write_copies(params, copies)

    return Optimizer(init, update)
