"""A timeline in characters: a row per rank, time to the right."""

from megatree.parallel.schedule.action import Action
from megatree.parallel.schedule.timeline import Timeline

PANELS, ROWS = 4, 32


def draw(timeline: Timeline, *, width: int = 100) -> str:
    """Return a text picture in which dots are idle time.

    An action shows its kind, its stage where a rank has several, its microbatch, and dashes for as
    long as it lasts. A long timeline folds into panels; one that needs more than four is scaled to
    a single panel, a letter per column for the kind of action that runs there. Of more than 32
    ranks, the first and last 16 are shown.

    Args:
        timeline: what to draw.
        width: characters of a line.

    >>> from megatree.parallel.schedule.fill_drain import one_f_one_b
    >>> from megatree.parallel.schedule.timeline import timeline
    >>> print(draw(timeline(one_f_one_b(2, 3))))
    rank 0 |F0 F1 .. .. B0--- F2 B1--- .. B2--- |
    rank 1 |.. F0 B0--- F1 B1--- F2 B2--- .. .. |
    2 stages on 2 ranks, 3 microbatches: makespan 12, bubble 25.0%, live microbatches at most 2
    """
    names = _names(timeline)
    cell = max((len(name) for name in names.values()), default=1) + 1
    lengths = {timeline.end[action] - timeline.start[action] for action in names}
    scale = cell / min((x for x in lengths if x > 0), default=1.0)
    prefix = len(f"rank {timeline.schedule.num_ranks - 1} ||")
    panel = max((width - prefix) // cell, 1) * cell
    if timeline.makespan * scale > PANELS * panel:
        panel = cell = max(width - prefix, 1)
        scale = panel / timeline.makespan
        names = {}
    total = round(timeline.makespan * scale)
    # Panels of equal length: none is a stub.
    panel = -(-total // max(-(-total // panel), 1) // cell) * cell or cell
    rows = {rank: _row(timeline, rank, names, scale, cell) for rank in _shown(timeline)}
    lines = []
    for first in range(0, total, panel):
        lines += [f"from {first / scale:g}:"] if total > panel else []
        lines += _panel(rows, timeline.schedule.num_ranks, first, panel)
    return "\n".join([*lines, str(timeline)])


def _names(timeline: Timeline) -> dict[Action, str]:
    one_each = timeline.schedule.num_stages == timeline.schedule.num_ranks
    return {
        action: f"{action.kind}{action.microbatch}" if one_each else str(action)
        for action in timeline.start
    }


def _shown(timeline: Timeline) -> list[int]:
    ranks = list(range(timeline.schedule.num_ranks))
    return ranks if len(ranks) <= ROWS else ranks[: ROWS // 2] + ranks[-ROWS // 2 :]


def _row(timeline: Timeline, rank: int, names: dict[Action, str], scale: float, cell: int) -> str:
    """Return a rank's line over the whole makespan; without names, one of letters."""
    idle = "." * (cell - 1) + " " if names else "."
    length = round(timeline.makespan * scale)
    line = list((idle * (length // len(idle) + 1))[:length])
    for action in timeline.schedule.ranks[rank]:
        first, stop = (round(t[action] * scale) for t in (timeline.start, timeline.end))
        room = stop - first
        text = names[action].ljust(room - 1, "-")[: room - 1] + " " if names else action.kind * room
        line[first:stop] = text[:room]
    return "".join(line)


def _panel(rows: dict[int, str], num_ranks: int, first: int, panel: int) -> list[str]:
    lines, last = [], -1
    for rank, row in rows.items():
        lines += ["..."] if rank > last + 1 else []
        number = f"{rank:{len(str(num_ranks - 1))}}"
        lines.append(f"rank {number} |{row[first : first + panel]}|")
        last = rank
    return lines
