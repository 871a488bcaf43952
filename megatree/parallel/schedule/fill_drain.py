"""Schedules of one stage per rank with whole backwards: GPipe and 1F1B."""

from megatree.parallel.schedule.action import Action, Schedule, check_counts


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards: every rank holds every microbatch.

    Bubble over ideal time: (p - 1) / m, for p ranks and m microbatches.

    Reference: Huang et al. 2019, "GPipe", section 2.3.
    """
    check_counts("gpipe", num_ranks, num_microbatches)
    microbatches = range(num_microbatches)
    rows = [
        [Action(kind, rank, i) for kind in ("F", "B") for i in microbatches]
        for rank in range(num_ranks)
    ]
    return Schedule(tuple(map(tuple, rows)), tuple(range(num_ranks)))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """A backward as soon as there is one: rank r holds at most p - r microbatches.

    Bubble over ideal time: (p - 1) / m, as GPipe's.

    Reference: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters
    Using Megatron-LM", section 2.2.1 (PipeDream-Flush).

    >>> print(one_f_one_b(2, 2))
    F0.0, F0.1, B0.0, B0.1
    F1.0, B1.0, F1.1, B1.1
    """
    check_counts("one_f_one_b", num_ranks, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        row = [Action("F", rank, i) for i in range(warmup)]
        for i in range(num_microbatches):
            if warmup + i < num_microbatches:
                row.append(Action("F", rank, warmup + i))
            row.append(Action("B", rank, i))
        rows.append(tuple(row))
    return Schedule(tuple(rows), tuple(range(num_ranks)))
