"""Zero-bubble schedules: weight gradients (W) fill the time in which a rank would be idle."""

import heapq

from megatree.parallel.schedule.action import Action, Kind, Schedule, check_counts, feeds, needs
from megatree.parallel.schedule.costs import Costs

KINDS: tuple[Kind, ...] = ("F", "B", "W")


def zero_bubble_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with split backwards: no rank holds more than p microbatches, the most of 1F1B.

    Rank r puts its weight gradients off by r microbatches: backwards of earlier ranks start sooner,
    and there is work left when 1F1B drains. With F = B = W the bubble over ideal time is
    (p - 1) / (3 * m) from m = p on, a third of 1F1B's.

    Reference: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1.
    """
    check_counts("zero_bubble_h1", num_ranks, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        row = [Action("F", rank, i) for i in range(warmup)]
        for i in range(num_microbatches):
            if warmup + i < num_microbatches:
                row.append(Action("F", rank, warmup + i))
            row.append(Action("B", rank, i))
            if i >= rank:
                row.append(Action("W", rank, i - rank))
        first_left = max(num_microbatches - rank, 0)
        row += [Action("W", rank, i) for i in range(first_left, num_microbatches)]
        rows.append(tuple(row))
    return Schedule(tuple(rows), tuple(range(num_ranks)))


def zero_bubble_v(num_ranks: int, num_microbatches: int, costs: Costs | None = None) -> Schedule:
    """Two stages a rank, in a V: stage s on rank s going out, on rank 2p - 1 - s coming back.

    A rank holds at most 2p of these half-size stages' microbatches: as many bytes as 1F1B's first
    rank. With F = B = W and m >= p a step takes 6m + p - 1 stage times, the least there is on a V
    (the last rank cannot start sooner): the bubble over ideal time is (p - 1) / (6 * m).

    The schedule is built by playing it. A rank that falls free takes, of the actions that are
    ready, a forward before a backward before weight gradients; of one kind the outbound stage's
    first, and once the rank's forwards are over the inbound one's, whose gradient has the longer
    way to go. Two bounds hold an outbound forward back: it leads the inbound ones of its rank by no
    more than the trip between them takes, and it leaves memory for one of them. So the oldest
    unfinished microbatch can always go on, whatever the durations.

    Args:
        num_ranks: pipeline ranks p.
        num_microbatches: microbatches m of one step.
        costs: durations to build for, of 2p stages; the unit durations unless given.

    Reference: Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", section 3 (the V and
    its bounds; the construction here is another).
    """
    check_counts("zero_bubble_v", num_ranks, num_microbatches)
    play = _Play(num_ranks, num_microbatches, costs or Costs())
    play.run()
    stages = range(2 * num_ranks)
    return Schedule(
        tuple(map(tuple, play.rows)), tuple(min(s, 2 * num_ranks - 1 - s) for s in stages)
    )


class _Play:
    """The state of the ranks while a schedule in a V is played."""

    def __init__(self, num_ranks: int, num_microbatches: int, costs: Costs) -> None:
        self.p, self.m, self.num_stages = num_ranks, num_microbatches, 2 * num_ranks
        self.transfer = costs.transfer
        self.duration = costs.by_kind(self.num_stages, splits=True)
        self.rows: list[list[Action]] = [[] for _ in range(num_ranks)]
        self.free = [0.0] * num_ranks
        self.end: dict[Action, float] = {}
        # kind -> stage -> the next microbatch; microbatches go in order.
        self.next: dict[Kind, list[int]] = {k: [0] * self.num_stages for k in KINDS}

    def rank_of(self, stage: int) -> int:
        return min(stage, self.num_stages - 1 - stage)

    def run(self) -> None:
        # (time, rank): a moment at which the rank falls free or something reaches it.
        moments = [(0.0, rank) for rank in range(self.p)]
        while moments:
            now, rank = heapq.heappop(moments)
            if self.free[rank] > now:
                continue
            action = self.choose(rank, now)
            if action is None:
                continue
            self.next[action.kind][action.stage] += 1
            self.rows[rank].append(action)
            self.end[action] = self.free[rank] = now + self.duration[action.kind][action.stage]
            heapq.heappush(moments, (self.free[rank], rank))
            fed = feeds(action, self.num_stages)
            if fed is not None and self.rank_of(fed.stage) != rank:
                there = self.free[rank] + self.transfer
                heapq.heappush(moments, (there, self.rank_of(fed.stage)))

    def choose(self, rank: int, now: float) -> Action | None:
        out, back = rank, self.num_stages - 1 - rank
        stages = (out, back) if self.next["F"][back] < self.m else (back, out)
        for kind in KINDS:
            for stage in stages:
                action = Action(kind, stage, self.next[kind][stage])
                if action.microbatch < self.m and self.allowed(action) and self.ready(action, now):
                    return action
        return None

    def allowed(self, action: Action) -> bool:
        if action.kind != "F":
            return True
        out, back = self.rank_of(action.stage), self.num_stages - 1 - self.rank_of(action.stage)
        forwards, weights = self.next["F"], self.next["W"]
        room = 2 * self.p - sum(forwards[s] - weights[s] for s in (out, back))
        if action.stage == back:
            return room > 0
        return room > 1 and forwards[out] - forwards[back] < back - out

    def ready(self, action: Action, now: float) -> bool:
        rank = self.rank_of(action.stage)
        for need in needs(action, self.num_stages):
            away = self.rank_of(need.stage) != rank
            if self.end.get(need, float("inf")) + self.transfer * away > now:
                return False
        return True
