"""The laws of a schedule: each action once, on its rank, in a possible order, within memory."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import get_args

from megatree.parallel.schedule.action import Action, Kind, Schedule
from megatree.parallel.schedule.grid import grid
from megatree.parallel.schedule.live import held
from megatree.parallel.schedule.walk import walk

SHOWN = 8


def validate(schedule: Schedule, *, max_live: int | Sequence[int] | None = None) -> None:
    """Check a schedule, without processes and in time linear in its actions.

    Every microbatch has one F and one B (and one W, if the schedule has any) on every stage, on the
    rank that holds the stage; the ranks, each in its order, never wait for each other in a circle.

    Args:
        schedule: what to check.
        max_live: the most (stage, microbatch) pairs whose activations a rank may hold at one time,
            for all ranks or per rank; unbounded unless given.

    Raises:
        ValueError: a law is broken; the message shows the grid with the guilty cells marked.
    """
    cells = [(r, n, action) for r, row in enumerate(schedule.ranks) for n, action in enumerate(row)]
    _check_cells(schedule, cells)
    _check_once(schedule, cells)
    for _ in walk(schedule):
        pass
    if max_live is not None:
        _check_live(schedule, max_live)


Cell = tuple[int, int, Action]


def _check_cells(schedule: Schedule, cells: list[Cell]) -> None:
    kinds, num_stages = get_args(Kind), schedule.num_stages
    unknown = [c for c in cells if c[2].kind not in kinds or c[2].microbatch < 0]
    _refuse(schedule, unknown, "is no action", "Write F, B or W, a stage and a microbatch: F0.0.")
    outside = [c for c in cells if not 0 <= c[2].stage < num_stages]
    what = f"names no stage of the {num_stages}"
    _refuse(schedule, outside, what, f"Use stages 0..{num_stages - 1}, or extend stage_rank.")
    lost = [c for c in cells if schedule.stage_rank[c[2].stage] != c[0]]
    if lost:
        home = schedule.stage_rank[lost[0][2].stage]
        what = f"belongs to stage {lost[0][2].stage}, which rank {home} holds"
        _refuse(schedule, lost, what, f"Move it to rank {home}, or change stage_rank.")


def _check_once(schedule: Schedule, cells: list[Cell]) -> None:
    if not cells:
        raise ValueError("schedule: there is no action. Give every stage an F and a B.")
    count = Counter(action for _, _, action in cells)
    twice = [c for c in cells if count[c[2]] > 1]
    _refuse(schedule, twice, "is there more than once", "Keep one of them.")
    absent = [action for action in _complete(schedule) if action not in count]
    homes = [schedule.stage_rank[action.stage] for action in absent]
    ends = [(r, len(schedule.ranks[r]), a) for r, a in zip(homes, absent, strict=True)]
    _refuse(schedule, ends, "is missing", "Add it to the row.")


def _complete(schedule: Schedule) -> Iterator[Action]:
    kinds: tuple[Kind, ...] = ("F", "B", "W") if schedule.splits else ("F", "B")
    for kind in kinds:
        for stage in range(schedule.num_stages):
            for microbatch in range(schedule.num_microbatches):
                yield Action(kind, stage, microbatch)


def _check_live(schedule: Schedule, max_live: int | Sequence[int]) -> None:
    bounds = [max_live] * schedule.num_ranks if isinstance(max_live, int) else list(max_live)
    if len(bounds) != schedule.num_ranks:
        raise ValueError(
            f"schedule: max_live has {len(bounds)} bounds for {schedule.num_ranks} ranks. "
            f"Give one per rank, or one number for all."
        )
    size = (1,) * schedule.num_stages
    over = []
    for rank, bound in enumerate(bounds):
        run = enumerate(held(schedule, rank, size))
        first = next(((rank, n, action) for n, (action, now) in run if now > bound), None)
        over += [first] if first else []
    if over:
        rank = over[0][0]
        most = max(now for _, now in held(schedule, rank, size))
        what = f"is one live microbatch more than the {bounds[rank]} allowed"
        last = "W" if schedule.splits else "B"
        fix = f"Run a {last} before it, or allow rank {rank} the {most:g} that it comes to hold."
        _refuse(schedule, over, what, fix)


def _refuse(schedule: Schedule, guilty: list[Cell], what: str, fix: str) -> None:
    if not guilty:
        return
    rank, place, action = guilty[0]
    others = ", ".join(f"{a} on rank {r}" for r, _, a in guilty[1:SHOWN])
    more = f" and {len(guilty) - SHOWN} more" if len(guilty) > SHOWN else ""
    also = f" So are: {others}{more}." if others else ""
    picture = grid(schedule.ranks, [(r, n) for r, n, _ in guilty[:SHOWN]])
    raise ValueError(
        f"schedule: {action} at place {place} of rank {rank} {what}. {fix}{also}\n{picture}"
    )
