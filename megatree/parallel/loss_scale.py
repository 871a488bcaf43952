"""Loss scaling for float16 as a state machine: state and overflow in, state out."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class LossScaleState:
    """What a checkpoint keeps.

    Args:
        scale: multiplies the loss; the gradients are divided by it.
        good: updates made since the scale last changed, or a step overflowed.
        tolerance: overflows until the scale shrinks.
    """

    scale: float
    good: int = 0
    tolerance: int = 0

    def to_json(self) -> dict[str, float | int]:
        """Return it as numbers by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "LossScaleState":
        """Return the state that `to_json` gave.

        Raises:
            ValueError: fields are missing, or there are others.
        """
        names = {"scale", "good", "tolerance"}
        if set(fields) != names:
            raise ValueError(
                f"loss_scale: a state of {sorted(fields)}, not of {sorted(names)}. "
                "Start from a checkpoint of this version."
            )
        return cls(
            scale=float(fields["scale"]),
            good=int(fields["good"]),
            tolerance=int(fields["tolerance"]),
        )


class LossScale(Protocol):
    """How a loss is scaled."""

    def start(self) -> LossScaleState:
        """Return the state before the first step."""
        ...

    def after(self, state: LossScaleState, *, overflow: bool) -> LossScaleState:
        """Return the state after a step; one that overflowed made no update, on any rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class StaticLossScale:
    """A scale that never changes.

    Args:
        scale: multiplies the loss.
    """

    scale: float

    def __post_init__(self) -> None:
        _check_scale("loss_scale.scale", self.scale)

    def start(self) -> LossScaleState:
        """Return the state before the first step."""
        return LossScaleState(scale=self.scale)

    def after(self, state: LossScaleState, *, overflow: bool) -> LossScaleState:
        """Return the same state."""
        return state


@dataclass(frozen=True, kw_only=True)
class DynamicLossScale:
    """A scale that grows after good steps, and shrinks once overflows are more than chance.

    `window` good steps in a row multiply it by `growth` and restore the tolerance of `hysteresis`
    overflows. Every overflow takes one from the tolerance, and with none left also multiplies the
    scale by `backoff`, not below `least`.

    Args:
        initial: scale before the first step.
        least: smallest scale.
        window: good steps in a row until it grows.
        hysteresis: overflows until it shrinks.
        growth: factor of growth.
        backoff: factor of shrinking.

    >>> scaling = DynamicLossScale(initial=8.0, window=2, hysteresis=1)
    >>> state = scaling.start()
    >>> for overflow in (False, False, True, True):
    ...     state = scaling.after(state, overflow=overflow)
    ...     print(state.scale)
    8.0
    16.0
    8.0
    4.0
    """

    initial: float = 2.0**32
    least: float = 1.0
    window: int = 1000
    hysteresis: int = 2
    growth: float = 2.0
    backoff: float = 0.5

    def __post_init__(self) -> None:
        _check_scale("loss_scale.least", self.least)
        _check_scale("loss_scale.initial", self.initial)
        if self.initial < self.least:
            raise ValueError(
                f"loss_scale.initial: {self.initial:g} is below least {self.least:g}. "
                f"Set initial to {self.least:g}."
            )
        if min(self.window, self.hysteresis) < 1:
            raise ValueError(
                f"loss_scale: window {self.window} and hysteresis {self.hysteresis} count steps. "
                "Give at least 1."
            )
        if not self.growth > 1.0 or not 0.0 < self.backoff < 1.0:
            raise ValueError(
                f"loss_scale: growth {self.growth} must be above 1, backoff {self.backoff} between "
                "0 and 1. Use 2 and 0.5."
            )

    def start(self) -> LossScaleState:
        """Return the state before the first step."""
        return LossScaleState(scale=self.initial, tolerance=self.hysteresis)

    def after(self, state: LossScaleState, *, overflow: bool) -> LossScaleState:
        """Return the state after a step; one that overflowed made no update, on any rank."""
        if overflow:
            tolerance = max(0, state.tolerance - 1)
            shrunk = max(self.least, state.scale * self.backoff)
            scale = state.scale if tolerance else shrunk
            return LossScaleState(scale=scale, good=0, tolerance=tolerance)
        if state.good + 1 < self.window:
            return LossScaleState(scale=state.scale, good=state.good + 1, tolerance=state.tolerance)
        return LossScaleState(scale=state.scale * self.growth, good=0, tolerance=self.hysteresis)


def _check_scale(place: str, scale: float) -> None:
    if not (scale > 0.0 and math.isfinite(scale)):
        raise ValueError(f"{place}: {scale} is no positive number. Use 1.0, or a power of 2.")
