"""A pipeline schedule as data: per rank, the actions of its stages in order."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]


class Action(NamedTuple):
    """One pass of a stage over a microbatch: F (forward), B (backward) or W (weight gradients).

    In a schedule with W actions, B computes the input gradient and W the weight gradients; in one
    without, B computes both.

    >>> Action("F", 2, 0)
    F2.0
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"

    __repr__ = __str__


@dataclass(frozen=True)
class Schedule:
    """What every pipeline rank does, in order; when follows from what its actions need.

    Args:
        ranks: per pipeline rank, its actions in order.
        stage_rank: per stage, the pipeline rank that holds it; stages count along the model.

    Raises:
        ValueError: a stage lies on a rank that does not exist, or a rank holds no stage. All that
            concerns single actions is the matter of `validate`.
    """

    ranks: tuple[tuple[Action, ...], ...]
    stage_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        lost = [s for s, rank in enumerate(self.stage_rank) if not 0 <= rank < len(self.ranks)]
        if lost:
            raise ValueError(
                f"Schedule: stage {lost[0]} is on rank {self.stage_rank[lost[0]]}, but there are "
                f"{len(self.ranks)} ranks. Name a rank of 0..{len(self.ranks) - 1} in stage_rank."
            )
        empty = sorted(set(range(len(self.ranks))) - set(self.stage_rank))
        if empty or not self.ranks:
            raise ValueError(
                f"Schedule: {len(self.stage_rank)} stages leave ranks {empty[:8]} of "
                f"{len(self.ranks)} without a stage. Use fewer ranks, or cut more stages."
            )

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Stages, at least one per rank."""
        return len(self.stage_rank)

    @cached_property
    def num_microbatches(self) -> int:
        """One more than the largest microbatch named."""
        return 1 + max((a.microbatch for row in self.ranks for a in row), default=-1)

    @cached_property
    def splits(self) -> bool:
        """Whether weight gradients are actions of their own."""
        return any(a.kind == "W" for row in self.ranks for a in row)

    def __str__(self) -> str:
        return "\n".join(", ".join(map(str, row)) for row in self.ranks)


def needs(action: Action, num_stages: int) -> tuple[Action, ...]:
    """Return the actions whose results `action` reads, the one on the neighbour stage last."""
    kind, stage, microbatch = action
    if kind == "W":
        return (Action("B", stage, microbatch),)
    if kind == "F":
        return () if stage == 0 else (Action("F", stage - 1, microbatch),)
    own = Action("F", stage, microbatch)
    return (own,) if stage == num_stages - 1 else (own, Action("B", stage + 1, microbatch))


def feeds(action: Action, num_stages: int) -> Action | None:
    """Return the action on the neighbour stage that reads the result of `action`, if any."""
    kind, stage, microbatch = action
    if kind == "F" and stage < num_stages - 1:
        return Action("F", stage + 1, microbatch)
    if kind == "B" and stage > 0:
        return Action("B", stage - 1, microbatch)
    return None


def check_counts(name: str, num_ranks: int, num_microbatches: int) -> None:
    """Refuse counts that no schedule has.

    Raises:
        ValueError: a count is below 1.
    """
    for what, count in (("ranks", num_ranks), ("microbatches", num_microbatches)):
        if count < 1:
            raise ValueError(f"{name}: {count} {what}. Give at least 1.")
