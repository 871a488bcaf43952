"""Who does what when: a schedule played with durations."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatree.parallel.schedule.action import Action, Schedule, needs
from megatree.parallel.schedule.costs import Costs, durations
from megatree.parallel.schedule.live import peak_live
from megatree.parallel.schedule.walk import walk


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When every action of a schedule starts and ends, in the unit of its costs."""

    schedule: Schedule
    costs: Costs
    start: Mapping[Action, float]
    end: Mapping[Action, float]

    @cached_property
    def makespan(self) -> float:
        """From 0 to the end of the last action."""
        return max(self.end.values(), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, the sum of its actions' durations."""
        return tuple(
            sum(self.end[action] - self.start[action] for action in row)
            for row in self.schedule.ranks
        )

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Per rank, the fraction of the makespan in which it is idle."""
        return tuple(1 - busy / self.makespan if self.makespan else 0.0 for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Fraction of all ranks' time that is idle; over ideal time it is bubble / (1 - bubble)."""
        return sum(self.bubbles) / self.schedule.num_ranks

    @cached_property
    def peak_live(self) -> tuple[float, ...]:
        """Per rank, the most (stage, microbatch) pairs whose activations it holds at one time."""
        return peak_live(self.schedule)

    def __str__(self) -> str:
        lives = self.peak_live
        return (
            f"{self.schedule.num_stages} stages on {self.schedule.num_ranks} ranks, "
            f"{self.schedule.num_microbatches} microbatches: makespan {self.makespan:g}, "
            f"bubble {self.bubble:.1%}, live microbatches at most {max(lives):g}"
        )


def timeline(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Play a schedule: every action starts when its rank is free and what it needs has arrived.

    Messages travel while ranks compute. Linear in the number of actions.

    Args:
        schedule: what to play.
        costs: durations per stage; F = B = W = 1 unless given (B = 2 where it is not split).

    Raises:
        ValueError: the schedule deadlocks, or costs that do not fit its stages.

    >>> from megatree.parallel.schedule.fill_drain import one_f_one_b
    >>> print(timeline(one_f_one_b(4, 8)))
    4 stages on 4 ranks, 8 microbatches: makespan 33, bubble 27.3%, live microbatches at most 4
    """
    costs = costs or Costs()
    duration = durations(schedule, costs)
    free = [0.0] * schedule.num_ranks
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    for rank, action in walk(schedule):
        begin = free[rank]
        for need in needs(action, schedule.num_stages):
            away = schedule.stage_rank[need.stage] != rank
            begin = max(begin, end[need] + costs.transfer if away else end[need])
        start[action] = begin
        free[rank] = end[action] = begin + duration[action]
    return Timeline(schedule=schedule, costs=costs, start=start, end=end)
