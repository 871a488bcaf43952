"""Rank programs run without tensors over channels that block, or that keep only the order."""

from collections import deque
from collections.abc import Sequence

from megatree.parallel.schedule.action import Action
from megatree.parallel.schedule.messages import Event, Recv, Send

Programs = Sequence[Sequence[Event]]


def run_blocking(programs: Programs) -> None:
    """Run programs where a send ends only with its receive, one event at a time on a rank.

    Raises:
        ValueError: ranks block each other, or a receive meets another message than its own.
    """
    position = [0] * len(programs)
    ready = deque(range(len(programs)))
    while ready:
        rank = ready.popleft()
        while (event := _at(programs, position, rank)) is not None:
            if isinstance(event, Action):
                position[rank] += 1
                continue
            other = event.to_rank if isinstance(event, Send) else event.from_rank
            facing = _at(programs, position, other)
            if not _meet(event, facing, rank):
                break
            assert isinstance(facing, Send | Recv)
            _compare(rank, event.message, other, facing.message)
            position[rank] += 1
            position[other] += 1
            ready.append(other)
    _check_finished(programs, position)


def run_fifo(programs: Programs) -> None:
    """Run programs where a send never waits and a channel hands out messages as they were sent.

    Raises:
        ValueError: a receive gets another message than its own, or waits for ever.
    """
    position = [0] * len(programs)
    channels: dict[tuple[int, int], deque[Action]] = {}
    ready = deque(range(len(programs)))
    while ready:
        rank = ready.popleft()
        while (event := _at(programs, position, rank)) is not None:
            if isinstance(event, Send):
                channels.setdefault((rank, event.to_rank), deque()).append(event.message)
                ready.append(event.to_rank)
            elif isinstance(event, Recv):
                channel = channels.get((event.from_rank, rank))
                if not channel:
                    break
                _compare(rank, event.message, event.from_rank, channel.popleft())
            position[rank] += 1
    _check_finished(programs, position)


def _at(programs: Programs, position: list[int], rank: int) -> Event | None:
    return programs[rank][position[rank]] if position[rank] < len(programs[rank]) else None


def _meet(event: Send | Recv, facing: Event | None, rank: int) -> bool:
    if isinstance(event, Send):
        return isinstance(facing, Recv) and facing.from_rank == rank
    return isinstance(facing, Send) and facing.to_rank == rank


def _compare(rank: int, message: Action, other: int, its_message: Action) -> None:
    if message != its_message:
        raise ValueError(
            f"rank {rank} is at message {message} with rank {other}, which is at {its_message}. "
            f"Post the messages of both in one order."
        )


def _check_finished(programs: Programs, position: list[int]) -> None:
    stuck = [
        f"rank {rank} at {event}"
        for rank in range(len(programs))
        if (event := _at(programs, position, rank)) is not None
    ]
    if stuck:
        raise ValueError(
            f"deadlock: {', '.join(stuck[:8])}. Post the messages of all ranks in one order."
        )
