"""The learning rate as a function of the step: linear warm-up, then half a cosine."""

import math
from collections.abc import Callable


def warmup_cosine(
    lr: float, *, min_lr: float, warmup_steps: int, steps: int
) -> Callable[[int], float]:
    """Return step (the first is 0) -> learning rate.

    It rises over `warmup_steps` to `lr`, which the step after them has, and falls to `min_lr`,
    which the step after the last would have: with 0 there, no step is wasted.

    >>> rate = warmup_cosine(1.0, min_lr=0.1, warmup_steps=2, steps=5)
    >>> [round(rate(step), 3) for step in range(5)]
    [0.333, 0.667, 1.0, 0.775, 0.325]
    """

    def rate(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / (warmup_steps + 1)
        along = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * along))

    return rate
