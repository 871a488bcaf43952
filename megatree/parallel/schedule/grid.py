"""Rows of actions printed as a grid with cells marked: how errors show a schedule."""

from collections.abc import Sequence

ROWS, COLUMNS = 8, 9


def grid(
    rows: Sequence[Sequence[object]],
    marked: Sequence[tuple[int, int]] = (),
    *,
    label: str = "rank",
) -> str:
    """Return the rows around marked cells, which stand in brackets.

    At most 8 rows of 9 cells are shown, marked rows first, each around its own first mark.

    Args:
        rows: per rank, its cells.
        marked: (rank, place) of cells; a place at a row's end marks that something is missing.
        label: what a row is.

    >>> print(grid([["F0.0", "B0.0"], ["F1.0", "B1.0"]], [(1, 1)]))
      rank 0 |  F0.0   B0.0
      rank 1 |  F1.0  [B1.0]
    """
    shown = _near([rank for rank, _ in marked], len(rows))
    centre = dict(reversed(marked))
    default = marked[0][1] if marked else 0
    windows = {
        rank: _window(rows[rank], centre.get(rank, default), (rank, len(rows[rank])) in marked)
        for rank in shown
    }
    width = max((len(name) for _, names, _ in windows.values() for name in names), default=0)
    lines = []
    for last, rank in zip([-1, *shown], shown, strict=False):
        lines += ["  ..."] if rank > last + 1 else []
        first, names, more = windows[rank]
        cells = [
            (f"[{name}]" if (rank, first + n) in marked else f" {name} ").ljust(width + 2)
            for n, name in enumerate(names)
        ]
        line = " ".join(["..."] * (first > 0) + cells + ["..."] * more)
        lines.append(f"  {label} {rank:{len(str(len(rows) - 1))}} | {line}".rstrip())
    lines += ["  ..."] if shown and shown[-1] < len(rows) - 1 else []
    return "\n".join(lines)


def _near(marked: list[int], num_ranks: int) -> list[int]:
    """Return the ranks to show: the marked ones, then their neighbours."""
    distances = sorted(range(-ROWS, ROWS + 1), key=abs)
    near = dict.fromkeys(r + d for d in distances for r in marked[:ROWS] or [0])
    return sorted([r for r in near if 0 <= r < num_ranks][:ROWS])


def _window(row: Sequence[object], centre: int, gap: bool) -> tuple[int, list[str], bool]:
    """Return the first place shown, the cells from there, and whether more follow."""
    length = len(row) + gap
    first = max(min(centre - COLUMNS // 2, length - COLUMNS), 0)
    names = [str(cell).strip() for cell in row[first : first + COLUMNS]]
    names += ["?"] if gap and first + COLUMNS >= length else []
    return first, names, first + COLUMNS < length
