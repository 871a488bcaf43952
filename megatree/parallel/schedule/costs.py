"""How long the actions of every stage take."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatree.parallel.schedule.action import Action, Kind, Schedule

PerStage = float | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Durations in seconds (or any one unit), each one number for all stages or one per stage.

    The default is the field's unit: F = B = W = 1, and B = 2 where backwards are not split.

    Args:
        forward: a forward.
        input_grad: the part of a backward that computes the input gradient.
        weight_grad: the part of a backward that computes the weight gradients.
        transfer: from the end of an action to the moment at which another rank has its result;
            no rank is busy meanwhile.

    Raises:
        ValueError: a negative duration.
    """

    forward: PerStage = 1.0
    input_grad: PerStage = 1.0
    weight_grad: PerStage = 1.0
    transfer: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "input_grad", "weight_grad", "transfer"):
            given = getattr(self, name)
            numbers = given if isinstance(given, Sequence) else (given,)
            bad = [x for x in numbers if not 0 <= x < float("inf")]
            if bad:
                raise ValueError(f"Costs: {name} of {bad[0]}. Give a duration of at least 0.")

    def by_kind(self, num_stages: int, *, splits: bool) -> dict[Kind, tuple[float, ...]]:
        """Return kind -> stage -> duration, for schedules with or without W actions.

        Raises:
            ValueError: a list that has not one duration per stage.
        """
        forward = _per_stage("forward", self.forward, num_stages)
        inputs = _per_stage("input_grad", self.input_grad, num_stages)
        weights = _per_stage("weight_grad", self.weight_grad, num_stages)
        if splits:
            return {"F": forward, "B": inputs, "W": weights}
        whole = tuple(b + w for b, w in zip(inputs, weights, strict=True))
        return {"F": forward, "B": whole}


def durations(schedule: Schedule, costs: Costs) -> dict[Action, float]:
    """Return how long every action of a schedule takes."""
    table = costs.by_kind(schedule.num_stages, splits=schedule.splits)
    return {action: table[action.kind][action.stage] for row in schedule.ranks for action in row}


def _per_stage(name: str, given: PerStage, num_stages: int) -> tuple[float, ...]:
    if not isinstance(given, Sequence):
        return (float(given),) * num_stages
    if len(given) != num_stages:
        raise ValueError(
            f"Costs: {name} has {len(given)} durations for {num_stages} stages. "
            f"Give one per stage, or one number for all."
        )
    return tuple(map(float, given))
