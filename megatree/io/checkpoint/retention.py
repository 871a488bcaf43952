"""Which checkpoints of a run are kept: the last ones, every so many steps, the best."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatree.io.checkpoint.directory import discard, steps_in
from megatree.io.checkpoint.parse import read_manifest
from megatree.io.checkpoint.place import PathLike, Place

METRICS = "metrics"
"""The entry of `extra` that holds numbers by which the best is found."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What of a directory of checkpoints stays when another is saved.

    Law: the newest always stays. A checkpoint stays if any of the three says so.

    Args:
        last: how many of the newest; 0 keeps all, whatever the others say.
        every: and those whose step is a multiple of this; 0 for none.
        best: and so many with the best value of `metric`.
        metric: a number in `extra["metrics"]`; a checkpoint without it is never best.
        mode: which values are best.
    """

    last: int = 0
    every: int = 0
    best: int = 0
    metric: str = "valid_loss"
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if min(self.last, self.every, self.best) < 0:
            raise ValueError(
                f"Retention: last {self.last}, every {self.every} and best {self.best} count "
                "checkpoints. Give at least 0."
            )
        if (self.every or self.best) and not self.last:
            raise ValueError(
                f"Retention: last is 0, which keeps all, so every {self.every} and best "
                f"{self.best} change nothing. Set last to 1 or more."
            )

    def doomed(self, steps: Mapping[int, float | None]) -> list[int]:
        """Return the steps that go.

        Args:
            steps: of all complete checkpoints, with their metric if they have one.

        >>> Retention(last=1, every=10, best=1).doomed({8: 2.0, 10: 3.0, 12: 1.0, 14: 4.0, 16: 5.0})
        [8, 14]
        """
        if not self.last:
            return []
        sign = 1.0 if self.mode == "min" else -1.0
        # of equal values the later one, which has seen more
        ranked = sorted(
            (sign * value, -step)
            for step, value in steps.items()
            if value is not None and value == value
        )
        kept = {
            *sorted(steps)[-self.last :],
            *(step for step in steps if self.every and step % self.every == 0),
            *(-step for _, step in ranked[: self.best]),
        }
        return [step for step in sorted(steps) if step not in kept]


def retain(directory: PathLike, retention: Retention, *, newest: int) -> list[int]:
    """Remove what a retention does not keep, up to the step `newest`; return the steps removed.

    Raises:
        OSError: a checkpoint cannot be removed.
        ValueError: the manifest of one is damaged, so its metric is unknown.
    """
    if not retention.last:
        return []
    found = {step: place for step, place in steps_in(directory).items() if step <= newest}
    values = {
        step: _metric(place, retention.metric) if retention.best else None
        for step, place in found.items()
    }
    gone = retention.doomed(values)
    for step in gone:
        discard(found[step])
    return gone


def _metric(checkpoint: Place, name: str) -> float | None:
    metrics = read_manifest(checkpoint).extra.get(METRICS)
    value = metrics.get(name) if isinstance(metrics, dict) else None
    return float(value) if isinstance(value, int | float) else None
