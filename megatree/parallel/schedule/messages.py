"""What each rank runs: its actions, and its messages in one order that holds for all ranks."""

from dataclasses import dataclass

from megatree.parallel.schedule.action import Action, Schedule, feeds, needs
from megatree.parallel.schedule.costs import Costs
from megatree.parallel.schedule.timeline import Timeline, timeline


@dataclass(frozen=True)
class Send:
    """Send a result to the rank whose action `message` reads it.

    A message bears the name of its reader: F2.0 carries stage 1's output to stage 2, B1.0 the
    gradient of that value back to stage 1.
    """

    to_rank: int
    message: Action

    def __str__(self) -> str:
        return f"{self.message}->{self.to_rank}"


@dataclass(frozen=True)
class Recv:
    """Receive from `from_rank` what this rank's action `message` will read."""

    from_rank: int
    message: Action

    def __str__(self) -> str:
        return f"{self.message}<-{self.from_rank}"


Event = Action | Send | Recv
# Time, zero-length actions before it at that time, message (0) or action (1), its name.
Key = tuple[float, int, int, Action]


def rank_programs(schedule: Schedule, costs: Costs | None = None) -> tuple[tuple[Event, ...], ...]:
    """Return per rank its actions with the sends and receives between them.

    All events of all ranks have one place each in a single order. A message stands where the
    timeline produces it, after its producer and before its reader. Every rank's program is its part
    of that order. So the first event that is not done can always be done: there is no deadlock even
    if a send blocks until its receive is posted and a rank posts one event at a time; and a channel
    without tags hands out messages as they are asked for. Stages on one rank exchange no message.

    Args:
        schedule: a valid schedule.
        costs: durations that place the messages; any give the law.

    Raises:
        ValueError: as `timeline`.

    >>> from megatree.parallel.schedule.fill_drain import one_f_one_b
    >>> for program in rank_programs(one_f_one_b(2, 2)): print(*program)
    F0.0 F1.0->1 F0.1 F1.1->1 B0.0<-1 B0.0 B0.1<-1 B0.1
    F1.0<-0 F1.0 F1.1<-0 B1.0 B0.0->0 F1.1 B1.1 B0.1->0
    """
    times = timeline(schedule, costs)
    programs: list[list[tuple[Key, Event]]] = [[] for _ in schedule.ranks]
    for action, (before, after) in _levels(times).items():
        rank = schedule.stage_rank[action.stage]
        programs[rank].append(((times.start[action], before, 1, action), action))
        message = feeds(action, schedule.num_stages)
        if message is None or schedule.stage_rank[message.stage] == rank:
            continue
        reader = schedule.stage_rank[message.stage]
        key = (times.end[action], after, 0, message)
        programs[rank].append((key, Send(reader, message)))
        programs[reader].append((key, Recv(rank, message)))
    return tuple(
        tuple(event for _, event in sorted(program, key=lambda item: item[0]))
        for program in programs
    )


def _levels(times: Timeline) -> dict[Action, tuple[int, int]]:
    """Count the zero-length actions that come before an action, and before its end, at that time.

    Times alone order all events if every action lasts; where one does not, what it needs ends when
    it starts and ends itself when its readers start.
    """
    levels: dict[Action, tuple[int, int]] = {}
    last: dict[int, Action] = {}
    for action, start in times.start.items():
        rank = times.schedule.stage_rank[action.stage]
        sources = [
            *needs(action, times.schedule.num_stages),
            *([last[rank]] if rank in last else []),
        ]
        before = max((levels[s][1] for s in sources if times.end[s] == start), default=0)
        levels[action] = before, before + 1 if times.end[action] == start else 0
        last[rank] = action
    return levels
