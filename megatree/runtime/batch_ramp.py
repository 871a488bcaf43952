"""The global batch size as a function of the samples consumed so far: it grows by steps."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Segment(NamedTuple):
    """Steps of one batch size: from step `step` and `consumed` samples on, until the next one."""

    step: int
    consumed: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """A global batch that grows from `start` to `final` by `increment`.

    Law: after c consumed samples the batch is start + increment * floor(c * n / samples) with
    n = (final - start) / increment, and final from `samples` on. It follows from c alone, in
    integers, so a resume makes the very same steps, and a step has one number of samples whether a
    run is counted by steps or by samples.

    Args:
        start: sequences of the first step.
        increment: sequences by which the batch grows at a time.
        samples: consumed sequences from which on the batch is final.
        final: sequences of a step after the ramp.

    >>> ramp = BatchRamp(start=2, increment=2, samples=12, final=6)
    >>> [(step, ramp.consumed(step), ramp.batch(ramp.consumed(step))) for step in range(6)]
    [(0, 0, 2), (1, 2, 2), (2, 4, 2), (3, 6, 4), (4, 10, 4), (5, 14, 6)]
    """

    start: int
    increment: int
    samples: int
    final: int

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.final:
            raise ValueError(
                f"batch_ramp.start: {self.start} is not between 1 and final {self.final}. "
                f"Set start to at most {self.final}."
            )
        if self.start == self.final:
            return
        if self.increment < 1 or self.samples < 1:
            raise ValueError(
                f"batch_ramp: increment {self.increment} and samples {self.samples} never get "
                f"from {self.start} to {self.final}. Give at least 1 of each, or start "
                f"{self.final}."
            )
        if rest := (self.final - self.start) % self.increment:
            nearest = min(
                (d for d in range(1, self.final - self.start + 1) if self._reaches(d)),
                key=lambda d: abs(d - self.increment),
            )
            raise ValueError(
                f"batch_ramp.increment: {self.increment} does not divide the way from "
                f"{self.start} to {self.final} ({rest} are left over). Set increment to {nearest}, "
                f"or final to {self.final - rest}."
            )

    def _reaches(self, increment: int) -> bool:
        return (self.final - self.start) % increment == 0

    @classmethod
    def constant(cls, batch: int) -> "BatchRamp":
        """Return the ramp of a batch that never changes."""
        return cls(start=batch, increment=0, samples=0, final=batch)

    @property
    def num_increments(self) -> int:
        """How often the batch grows."""
        return 0 if self.start == self.final else (self.final - self.start) // self.increment

    def batch(self, consumed: int) -> int:
        """Return the sequences of the step that starts after `consumed` samples."""
        if self.start == self.final or consumed >= self.samples:
            return self.final
        return self.start + consumed * self.num_increments // self.samples * self.increment

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The parts of a run that have one batch size each, in order."""
        found, step, consumed = [], 0, 0
        while (batch := self.batch(consumed)) < self.final:
            found.append(Segment(step, consumed, batch))
            level = (batch - self.start) // self.increment + 1
            ends = -(-level * self.samples // self.num_increments)
            steps = -(-(ends - consumed) // batch)
            step, consumed = step + steps, consumed + steps * batch
        return (*found, Segment(step, consumed, self.final))

    def consumed(self, step: int) -> int:
        """Return the samples that the steps before `step` take together."""
        if step < 0:
            raise ValueError(f"batch_ramp: no step is {step}. Count from 0.")
        at = self.segments[bisect_right(self.segments, step, key=lambda s: s.step) - 1]
        return at.consumed + (step - at.step) * at.batch

    def step(self, consumed: int) -> int:
        """Return the number of steps that take exactly `consumed` samples.

        Raises:
            ValueError: no number of steps does; the run had another batch size.
        """
        steps = self.num_steps(consumed)
        if (before := self.consumed(steps)) != consumed:
            raise ValueError(
                f"batch_ramp: {consumed} consumed samples are no whole number of steps; "
                f"{steps} steps take {before}, {steps + 1} take {self.consumed(steps + 1)}. "
                "Go on with the batch sizes that the run began with."
            )
        return steps

    def num_steps(self, samples: int) -> int:
        """Return the number of whole steps within `samples` samples."""
        if samples < 0:
            raise ValueError(f"batch_ramp: {samples} samples. Give at least 0.")
        at = self.segments[bisect_right(self.segments, samples, key=lambda s: s.consumed) - 1]
        return at.step + (samples - at.consumed) // at.batch

    def num_microbatches(self, consumed: int, microbatch: int) -> int:
        """Return the number of microbatches of the step that starts after `consumed` samples."""
        self.check(microbatch)
        return self.batch(consumed) // microbatch

    def check(self, microbatch: int) -> None:
        """Refuse a microbatch (sequences over all ranks) that does not divide every batch.

        Raises:
            ValueError: names the first batch that it does not divide.
        """
        if microbatch < 1:
            raise ValueError(f"batch_ramp.microbatch: {microbatch}. Give at least 1.")
        for level in range(self.num_increments + 1):
            batch = self.start + level * self.increment
            if batch % microbatch:
                what = "start" if level == 0 else "increment"
                value = self.start if level == 0 else self.increment
                common = math.gcd(self.start, self.final, self.increment, microbatch)
                raise ValueError(
                    f"batch_ramp.{what}: {value} makes a batch of {batch} sequences, no whole "
                    f"number of microbatches of {microbatch}. Set {what} to "
                    f"{-(-value // microbatch) * microbatch}, or microbatch to {common}."
                )
