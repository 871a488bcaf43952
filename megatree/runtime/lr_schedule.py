"""Learning rate and weight decay as functions of how far a run is, in steps or in samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "inverse_square_root", "wsd"]
Anneal = Literal["linear", "cosine", "exponential", "minus_sqrt"]
Unit = Literal["steps", "samples"]


@dataclass(frozen=True)
class Steps:
    """A length in updates."""

    count: int


@dataclass(frozen=True)
class Samples:
    """A length in sequences."""

    count: int


@dataclass(frozen=True)
class Fraction:
    """A length as a share of the whole schedule's."""

    share: float


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """The learning rate after `n` steps or samples; made by `lr_schedule`.

    Law: with W = warmup, D = length, r = (n - W) / (D - W),
    from init_lr to lr over n <= W, then min_lr + c * (lr - min_lr), and min_lr beyond D;
    c = 1 - r (linear), (1 + cos(pi r)) / 2 (cosine). wsd has c = 1 until D - anneal, then with
    q in [0, 1] along the rest 1 - q (linear), (1 + cos(pi q)) / 2 (cosine), 2 * 0.5**q - 1
    (exponential) or 1 - sqrt(q) (minus_sqrt). inverse_square_root is lr * sqrt(W / n), at least
    min_lr; constant is lr for ever.

    Args:
        counted_by: what `n`, warmup, length and anneal count.
        decay: shape after the warm-up.
        lr: largest rate.
        min_lr: least rate after the warm-up.
        init_lr: rate at n = 0, if there is a warm-up.
        warmup: W.
        length: D; None for a shape that has no end.
        anneal: length of the last part of wsd.
        anneal_shape: shape of that part.
    """

    counted_by: Unit
    decay: Decay
    lr: float
    min_lr: float = 0.0
    init_lr: float = 0.0
    warmup: float = 0.0
    length: float | None = None
    anneal: float = 0.0
    anneal_shape: Anneal = "exponential"

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"lr_schedule.min_lr: {self.min_lr} is not between 0 and lr {self.lr}. "
                f"Set min_lr to at most {self.lr}."
            )
        if not 0.0 <= self.init_lr <= self.lr:
            raise ValueError(
                f"lr_schedule.init_lr: {self.init_lr} is not between 0 and lr {self.lr}. "
                f"Set init_lr to at most {self.lr}."
            )
        if self.warmup < 0.0:
            raise ValueError(f"lr_schedule.warmup: {self.warmup:g} is negative. Give at least 0.")
        if self.length is None:
            if self.decay not in ("constant", "inverse_square_root"):
                raise ValueError(
                    f"lr_schedule.length: {self.decay!r} comes down to min_lr at its end, and has "
                    'none. Give length=, or decay="constant".'
                )
        elif not self.warmup < self.length:
            raise ValueError(
                f"lr_schedule.warmup: {self.warmup:g} {self.counted_by} leave nothing of "
                f"{self.length:g}. Give less than {self.length:g}."
            )
        if self.decay == "wsd":
            assert self.length is not None
            if not 0.0 < self.anneal <= self.length - self.warmup:
                raise ValueError(
                    f"lr_schedule.anneal: {self.anneal:g} {self.counted_by} of {self.length:g} "
                    f"with a warm-up of {self.warmup:g}. Give more than 0 and at most "
                    f"{self.length - self.warmup:g}."
                )
        elif self.anneal:
            raise ValueError(
                f'lr_schedule.anneal: a part of "wsd", and decay is {self.decay!r}. '
                'Set decay to "wsd", or leave anneal out.'
            )

    def value(self, n: int) -> float:
        """Return the learning rate after `n` steps, or samples."""
        if self.warmup and n <= self.warmup:
            return self.init_lr + (self.lr - self.init_lr) * n / self.warmup
        if self.decay == "constant":
            return self.lr
        if self.length is not None and n > self.length:
            return self.min_lr
        if self.decay == "inverse_square_root":
            past = math.sqrt(max(self.warmup, 1.0)) / math.sqrt(max(n, 1))
            return max(self.min_lr, self.lr * past)
        return self.min_lr + self._coefficient(n) * (self.lr - self.min_lr)

    def _coefficient(self, n: int) -> float:
        assert self.length is not None
        if self.decay != "wsd":
            along = (n - self.warmup) / (self.length - self.warmup)
            return 1.0 - along if self.decay == "linear" else _half_cosine(along)
        along = max(0.0, n - (self.length - self.anneal)) / self.anneal
        match self.anneal_shape:
            case "linear":
                return 1.0 - along
            case "cosine":
                return _half_cosine(along)
            case "exponential":
                return 2.0 * 0.5**along - 1.0
            case "minus_sqrt":
                return 1.0 - math.sqrt(along)

    def by_step(self, samples_before: Callable[[int], int] | None = None) -> Callable[[int], float]:
        """Return step (the first is 0) -> learning rate, as optimizers take it.

        Args:
            samples_before: step -> samples that the steps before it consumed
                (`BatchRamp.consumed`); needed if the schedule counts samples.

        Raises:
            ValueError: it counts samples, and nothing says how many a step is.
        """
        return _by_step(self.value, self.counted_by, samples_before, "lr_schedule")


def lr_schedule(
    lr: float,
    *,
    decay: Decay = "cosine",
    length: Steps | Samples | None = None,
    warmup: Steps | Samples | Fraction | None = None,
    min_lr: float = 0.0,
    init_lr: float = 0.0,
    anneal: Steps | Samples | Fraction | None = None,
    anneal_shape: Anneal = "exponential",
) -> LrSchedule:
    """Return the learning rate as a function of the steps, or of the samples, so far.

    It is counted by the unit of its lengths. Step 0 has init_lr: with 0 there it changes nothing
    (unless there is no warm-up), with lr / (warmup + 1) no step is wasted.

    Args:
        lr: largest rate.
        decay: shape after the warm-up.
        length: where min_lr is reached, warm-up included.
        warmup: part in which the rate rises from init_lr to lr; a Fraction is one of length.
        min_lr: least rate after the warm-up.
        init_lr: rate of step 0.
        anneal: last part of "wsd", in which the rate comes down; a Fraction is one of length.
        anneal_shape: shape of that part.

    Raises:
        ValueError: the lengths are in two units, or contradict each other.

    >>> rate = lr_schedule(1.0, length=Steps(4), warmup=Fraction(0.5), min_lr=0.2)
    >>> [round(rate.value(n), 2) for n in range(6)]
    [0.0, 0.5, 1.0, 0.6, 0.2, 0.2]
    """
    lengths = {"length": length, "warmup": warmup, "anneal": anneal}
    units = {name: type(of) for name, of in lengths.items() if isinstance(of, Steps | Samples)}
    if len(set(units.values())) > 1:
        said = ", ".join(f"{name} {lengths[name]}" for name in units)
        raise ValueError(
            f"lr_schedule: {said} are in two units. Give all in Steps, or all in Samples; a "
            "Fraction fits both."
        )

    def resolve(name: str) -> float:
        of = lengths[name]
        if of is None:
            return 0.0
        if not isinstance(of, Fraction):
            return of.count
        if not 0.0 <= of.share <= 1.0:
            raise ValueError(f"lr_schedule.{name}: {of.share} is no share. Use one in [0, 1].")
        if length is None:
            raise ValueError(
                f"lr_schedule.{name}: a share of {of.share} of a length that is not given. "
                "Give length=, or Steps or Samples."
            )
        return of.share * length.count

    return LrSchedule(
        counted_by="samples" if Samples in units.values() else "steps",
        decay=decay,
        lr=lr,
        min_lr=min_lr,
        init_lr=init_lr,
        warmup=resolve("warmup"),
        length=None if length is None else length.count,
        anneal=resolve("anneal"),
        anneal_shape=anneal_shape,
    )


@dataclass(frozen=True, kw_only=True)
class DecaySchedule:
    """Weight decay after `n` steps or samples: from `start` to `end` over `length`.

    Law: start + c * (end - start), c = n / length (linear) or (1 + cos(pi (1 - n / length))) / 2
    (cosine), and `end` beyond; constant is `end`, which `start` then equals.

    Args:
        shape: of the way.
        start: at n = 0.
        end: from `length` on.
        length: of the way; a constant needs none.
    """

    shape: Literal["constant", "linear", "cosine"]
    start: float
    end: float
    length: Steps | Samples | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end:
            raise ValueError(
                f"weight_decay: from {self.start} to {self.end}, which must rise from 0 or more. "
                f"Set start to at most {self.end}."
            )
        if self.shape == "constant" and self.start != self.end:
            raise ValueError(
                f"weight_decay.shape: constant, but start is {self.start} and end {self.end}. "
                f'Set start to {self.end}, or shape to "linear".'
            )
        if self.shape != "constant" and (self.length is None or self.length.count < 1):
            raise ValueError(
                f"weight_decay.length: {self.length} for {self.shape!r}. Give Steps or Samples of "
                "at least 1."
            )

    def value(self, n: int) -> float:
        """Return the weight decay after `n` steps, or samples."""
        if self.length is None or n >= self.length.count:
            return self.end
        along = n / self.length.count
        coefficient = {"constant": 1.0, "linear": along, "cosine": _half_cosine(1.0 - along)}
        return self.start + coefficient[self.shape] * (self.end - self.start)

    def by_step(self, samples_before: Callable[[int], int] | None = None) -> Callable[[int], float]:
        """Return step -> weight decay; see `LrSchedule.by_step`."""
        unit: Unit = "samples" if isinstance(self.length, Samples) else "steps"
        return _by_step(self.value, unit, samples_before, "weight_decay")


def _half_cosine(along: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * along))


def _by_step(
    value: Callable[[int], float],
    counted_by: Unit,
    samples_before: Callable[[int], int] | None,
    place: str,
) -> Callable[[int], float]:
    if counted_by == "steps":
        return value
    if samples_before is None:
        raise ValueError(
            f"{place}: counts samples, and nothing says how many the steps before a step took. "
            "Give samples_before=, such as a BatchRamp's consumed, or lengths in Steps."
        )
    return lambda step: value(samples_before(step))
