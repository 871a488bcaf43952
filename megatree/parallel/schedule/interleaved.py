"""Interleaved 1F1B: several stages a rank, stage s on rank s % p."""

from megatree.parallel.schedule.action import Action, Schedule, check_counts
from megatree.parallel.schedule.fill_drain import one_f_one_b
from megatree.parallel.schedule.grid import grid


def interleaved(
    num_ranks: int, num_microbatches: int, num_virtual: int, group: int | None = None
) -> Schedule:
    """1F1B over v virtual stages a rank: a bubble v times smaller for v times the messages.

    Every rank takes microbatches in groups; it passes a group through its first stage, then through
    its second and so on; backwards go through the stages in reverse. Rank r runs
    2 * (p - 1 - r) + (v - 1) * group forwards, then alternates: it holds at most one stage's
    microbatch more than that. Bubble over ideal time: (p - 1) / (m * v). With one virtual stage
    this is `one_f_one_b`.

    Args:
        num_ranks: pipeline ranks p.
        num_microbatches: microbatches m of one step.
        num_virtual: stages v on every rank.
        group: microbatches of a group; `num_ranks` unless given. A larger one holds more
            microbatches and gives messages more time.

    Raises:
        ValueError: not p <= group <= m, or a last group that is not full has fewer than p.

    Reference: Narayanan et al. 2021 (as for `one_f_one_b`), section 2.2.2.
    """
    check_counts("interleaved", num_ranks, num_microbatches)
    if num_virtual < 1:
        raise ValueError(f"interleaved: {num_virtual} virtual stages. Give at least 1.")
    if num_virtual == 1:
        return one_f_one_b(num_ranks, num_microbatches)
    group = num_ranks if group is None else group
    _check_group(num_ranks, num_microbatches, group)
    rows = [
        _row(rank, num_ranks, num_microbatches, num_virtual, group) for rank in range(num_ranks)
    ]
    return Schedule(tuple(rows), tuple(s % num_ranks for s in range(num_ranks * num_virtual)))


def _row(rank: int, p: int, m: int, v: int, group: int) -> tuple[Action, ...]:
    passes = [
        (chunk, i)
        for first in range(0, m, group)
        for chunk in range(v)
        for i in range(first, min(first + group, m))
    ]
    forwards = [Action("F", chunk * p + rank, i) for chunk, i in passes]
    backwards = [Action("B", (v - 1 - chunk) * p + rank, i) for chunk, i in passes]
    warmup = min(2 * (p - 1 - rank) + (v - 1) * group, len(passes))
    row = forwards[:warmup]
    for n, backward in enumerate(backwards):
        row += forwards[warmup + n : warmup + n + 1]
        row.append(backward)
    return tuple(row)


def _fits(p: int, m: int, group: int) -> bool:
    # A last group below p would ask a rank for a second stage before the first pass came round.
    return p <= group <= m and (m % group == 0 or m % group >= p)


def _check_group(p: int, m: int, group: int) -> None:
    if _fits(p, m, group):
        return
    if m < p:
        raise ValueError(
            f"interleaved: {m} microbatches for {p} ranks. Use at least {p} microbatches, "
            f"or one_f_one_b, which takes any count.\n{_groups(m, p, [(0, m)])}"
        )
    if not p <= group <= m:
        problem = f"a group of {group} microbatches is outside {p} (ranks)..{m} (microbatches)"
    else:
        problem = (
            f"{m} microbatches in groups of {group} leave a last group of {m % group}, "
            f"smaller than {p} ranks"
        )
    # The whole step as one group always fits, so the first search ends.
    other = min((g for g in range(p, m + 1) if _fits(p, m, g)), key=lambda g: abs(g - group))
    full, rest = divmod(m, group) if p <= group <= m else (0, m)
    marked = [(full, rest)] if group <= m else [(0, m)]
    if group < p:
        marked = [(0, n) for n in range(group, p)]
    picture = _groups(m, max(group, p), marked)
    raise ValueError(f"interleaved: {problem}. {_fix(p, m, group, other)}\n{picture}")


def _groups(m: int, group: int, marked: list[tuple[int, int]]) -> str:
    """Print the microbatches in their groups, one a row, and mark what is wrong."""
    rows = [range(first, min(first + group, m)) for first in range(0, m, group)]
    return grid(rows, marked, label="group")


def _fix(p: int, m: int, group: int, other: int) -> str:
    if not p <= group:
        return f"Set group={other}."
    count = next(n for n in range(max(m, group), 2 * (m + group)) if _fits(p, n, group))
    return f"Set group={other}, or use {count} microbatches."
