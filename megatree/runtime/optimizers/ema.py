"""An exponential moving average of the parameters, kept beside any optimizer's state."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatree.runtime.optimizers.optimizer import (
    Buffers,
    GroupRule,
    Optimizer,
    Schedule,
    State,
    value_at,
    wide,
)
from megatree.runtime.optimizers.rows import replace


def with_ema(optimizer: Optimizer, decay: float | Schedule) -> Optimizer:
    """Return an optimizer that also keeps state["ema"], float32 or wider.

    The average starts as the parameters; after every update it becomes
    decay * average + (1 - decay) * parameters.

    Args:
        optimizer: makes the updates.
        decay: weight of the past, or a function of the step.

    Raises:
        ValueError: the decay is outside [0, 1).
    """
    if not callable(decay) and not 0.0 <= decay < 1.0:
        raise ValueError(f"with_ema.decay: {decay} is not a decay. Use one in [0, 1).")

    def init(params: Buffers, groups: Mapping[str, GroupRule] | None = None) -> State:
        average = {name: p.detach().to(wide(p.dtype), copy=True) for name, p in params.items()}
        return {**optimizer.init(params, groups), "ema": average}

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
        inner = {entry: buffers for entry, buffers in state.items() if entry != "ema"}
        optimizer.update(
            params,
            grads,
            inner,
            step=step,
            groups=groups,
            scale=scale,
            found_inf=found_inf,
            copies=copies,
        )
        weight = 1.0 - value_at(decay, step)
        for name, param in params.items():
            rows = zip(state["ema"][name].unbind(0), param.unbind(0), strict=True)
            for average, row in rows:
                now = row.to(average.dtype)
                if found_inf is None:
                    average.lerp_(now, weight)
                else:
                    replace(average, torch.lerp(average, now, weight), found_inf)

    return Optimizer(init, update)
