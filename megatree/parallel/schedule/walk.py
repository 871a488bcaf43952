"""The actions of all ranks in one order in which every action comes after what it needs."""

from collections.abc import Iterator

from megatree.parallel.schedule.action import Action, Schedule, needs
from megatree.parallel.schedule.grid import grid


def walk(schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Yield (rank, action), each rank's in its own order, each after the actions that it needs.

    Linear in the number of actions.

    Raises:
        ValueError: ranks wait for each other, or for an action that is in no row; the message shows
            the grid with the waiting cells marked.
    """
    position = [0] * schedule.num_ranks
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    ready = list(reversed(range(schedule.num_ranks)))
    while ready:
        rank = ready.pop()
        row = schedule.ranks[rank]
        while position[rank] < len(row):
            action = row[position[rank]]
            missing = _first_missing(action, schedule.num_stages, done)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            position[rank] += 1
            done.add(action)
            yield rank, action
            ready += waiting.pop(action, ())
    if any(at < len(row) for at, row in zip(position, schedule.ranks, strict=True)):
        raise ValueError(_stuck(schedule, position, done))


def _first_missing(action: Action, num_stages: int, done: set[Action]) -> Action | None:
    for need in needs(action, num_stages):
        if need not in done:
            return need
    return None


def _stuck(schedule: Schedule, position: list[int], done: set[Action]) -> str:
    """Follow who waits for whom from the first waiting rank until a rank repeats."""
    rows = schedule.ranks
    later = {
        action: rank for rank, row in enumerate(rows) for action in reversed(row[position[rank] :])
    }
    rank = next(r for r, row in enumerate(rows) if position[r] < len(row))
    chain: list[tuple[int, Action, Action]] = []
    while rank not in [r for r, _, _ in chain]:
        action = rows[rank][position[rank]]
        missing = _first_missing(action, schedule.num_stages, done)
        assert missing is not None, (rank, action)
        if missing not in later:
            picture = grid(rows, [(rank, position[rank])])
            return (
                f"schedule: rank {rank} waits at {action} for {missing}, which no rank runs. "
                f"Add {missing} to its row.\n{picture}"
            )
        chain.append((rank, action, missing))
        rank = later[missing]
    cycle = chain[[r for r, _, _ in chain].index(rank) :]
    picture = grid(rows, [(r, position[r]) for r, _, _ in cycle])
    if len(cycle) == 1:
        [(rank, action, missing)] = cycle
        return (
            f"schedule: rank {rank} runs {action} before {missing}, which it needs. "
            f"Move {missing} before {action}.\n{picture}"
        )
    waits = ", ".join(f"rank {r} at {action} for {missing}" for r, action, missing in cycle[:8])
    more = f" and {len(cycle) - 8} more" if len(cycle) > 8 else ""
    first, last = cycle[0], cycle[-1]
    return (
        f"schedule: deadlock, ranks wait in a circle: {waits}{more}. "
        f"Move {last[2]} before {first[1]} on rank {first[0]}.\n{picture}"
    )
