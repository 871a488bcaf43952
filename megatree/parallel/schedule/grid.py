"""A schedule printed as a grid, ranks by places in their order, with cells marked."""

from collections.abc import Sequence

from megatree.parallel.schedule.action import Schedule

ROWS, COLUMNS = 8, 9


def grid(schedule: Schedule, marked: Sequence[tuple[int, int]] = ()) -> str:
    """Return the rows around marked cells, which stand in brackets.

    At most 8 rows of 9 cells are shown: the marked rows first, each around its own first mark.

    Args:
        schedule: what to print.
        marked: (rank, place) of cells; a place at a row's end marks what is missing there.

    >>> from megatree.parallel.schedule.fill_drain import one_f_one_b
    >>> print(grid(one_f_one_b(2, 2), [(1, 1)]))
      rank 0 |  F0.0   F0.1   B0.0   B0.1
      rank 1 |  F1.0  [B1.0]  F1.1   B1.1
    """
    rows = _rows(schedule.num_ranks, [rank for rank, _ in marked])
    centre = {rank: place for rank, place in reversed(marked)}
    default = marked[0][1] if marked else 0
    width = max((len(str(a)) for rank in rows for a in schedule.ranks[rank]), default=4)
    lines = []
    for before, rank in zip([-1, *rows], rows, strict=False):
        if rank > before + 1:
            lines.append("  ...")
        lines.append(_line(schedule, rank, centre.get(rank, default), set(marked), width))
    if rows[-1] < schedule.num_ranks - 1:
        lines.append("  ...")
    return "\n".join(lines)


def _rows(num_ranks: int, marked: list[int]) -> list[int]:
    near = [r + d for d in range(num_ranks) for r in marked or [0] for d in ((d, -d) if d else (0,))]
    return sorted(list(dict.fromkeys(r for r in near if 0 <= r < num_ranks))[:ROWS])


def _line(
    schedule: Schedule, rank: int, centre: int, marked: set[tuple[int, int]], width: int
) -> str:
    row = schedule.ranks[rank]
    names = [*map(str, row), "?"] if (rank, len(row)) in marked else [*map(str, row)]
    first = max(min(centre - COLUMNS // 2, len(names) - COLUMNS), 0)
    cells = [
        f"[{name}]" if (rank, first + n) in marked else f" {name} "
        for n, name in enumerate(names[first : first + COLUMNS])
    ]
    left = "... " if first else ""
    right = " ..." if first + COLUMNS < len(names) else ""
    line = " ".join(cell.ljust(width + 2) for cell in cells).rstrip()
    return f"  rank {rank:{len(str(schedule.num_ranks - 1))}} | {left}{line}{right}"
