"""Which steps of a run are profiled, and where their trace goes."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A profile of a run; it decides nothing of the run, so it is no part of its config.

    Args:
        steps: "first:stop" of the steps, counted from 0 where this run begins or goes on; the first
            ones compile, allocate and warm up.
        dir: folder of the trace; "" for "profile" in checkpoint.dir, or in the current folder.
    """

    steps: str = "10:13"
    dir: str = ""

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+):(\d+)", self.steps)
        if match is None or not 1 <= int(match[1]) < int(match[2]):
            raise ValueError(
                f"profile.steps: {self.steps!r} are no steps. Give first:stop, as 10:13 for three "
                "steps; step 0 compiles, so the first is at least 1."
            )

    @property
    def range(self) -> tuple[int, int]:
        """The first step and the one after the last."""
        first, _, stop = self.steps.partition(":")
        return int(first), int(stop)

    def check(self, num_steps: int) -> None:
        """Refuse steps that a run of so many does not make.

        Raises:
            ValueError: the run ends before.
        """
        first, stop = self.range
        if stop > num_steps:
            fix = "Raise train.steps"
            if num_steps > 1:
                fix += f", or set --profile-steps to {max(1, num_steps - 3)}:{num_steps}"
            raise ValueError(
                f"profile.steps: {first}:{stop}, but this run makes {num_steps} steps. {fix}."
            )
