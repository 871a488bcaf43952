"""Schedules as text that a person writes: one row per rank, cells such as F2.0."""

import re
from collections.abc import Iterable, Sequence
from typing import cast

from megatree.parallel.schedule.action import Action, Kind, Schedule
from megatree.parallel.schedule.grid import grid

CELL = re.compile(r"([FBW])(\d+)\.(\d+)", re.ASCII)


def from_csv(text: str) -> Schedule:
    """Read a schedule from comma-separated rows, one per rank; `str` of a schedule writes one.

    Empty cells are idle time and mean nothing, as do empty lines and lines that start with `#`.

    Raises:
        ValueError: as `from_rows`.

    >>> print(from_csv("F0.0, F0.1, B0.0, B0.1"))
    F0.0, F0.1, B0.0, B0.1
    """
    lines = [line.strip() for line in text.splitlines()]
    return from_rows([line.split(",") for line in lines if line and not line.startswith("#")])


def from_rows(rows: Sequence[Iterable[Action | str]]) -> Schedule:
    """Build a schedule from hand-written rows; a stage lies on the rank whose row names it.

    Args:
        rows: per rank, its actions in order, as values or as text ("F2.0": forward of stage 2 on
            microbatch 0).

    Raises:
        ValueError: a cell that is no action, a stage named by two rows or by none.
    """
    cells = [[cell for cell in row if str(cell).strip()] for row in rows]
    ranks = tuple(
        tuple(_action(cells, rank, place) for place in range(len(row)))
        for rank, row in enumerate(cells)
    )
    if not any(ranks):
        raise ValueError("schedule: no row names an action. Write one row per rank: F0.0, B0.0.")
    home: dict[int, int] = {}
    for rank, row in enumerate(ranks):
        for place, action in enumerate(row):
            if home.setdefault(action.stage, rank) != rank:
                raise ValueError(
                    f"schedule: {action} at place {place} of rank {rank} is of a stage that "
                    f"rank {home[action.stage]} runs too. Keep a stage on one rank.\n"
                    f"{grid(ranks, [(rank, place)])}"
                )
    absent = sorted(set(range(max(home) + 1)) - set(home))
    if absent:
        raise ValueError(
            f"schedule: no row names stage {absent[0]}, but there are {len(home)} stages up to "
            f"{max(home)}. Number the stages 0, 1, 2 and so on along the model."
        )
    return Schedule(ranks, tuple(home[stage] for stage in sorted(home)))


def _action(cells: list[list[Action | str]], rank: int, place: int) -> Action:
    cell = cells[rank][place]
    if isinstance(cell, Action):
        return cell
    match = CELL.fullmatch(cell.strip())
    if match is None:
        raise ValueError(
            f"schedule: {cell.strip()!r} at place {place} of rank {rank} is no action. "
            f"Write F, B or W, a stage and a microbatch: F0.0.\n{grid(cells, [(rank, place)])}"
        )
    kind, stage, microbatch = match.groups()
    return Action(cast(Kind, kind), int(stage), int(microbatch))
