"""How many microbatches' activations the ranks hold at most."""

from collections.abc import Iterator, Sequence

from megatree.parallel.schedule.action import Action, Schedule


def held(schedule: Schedule, rank: int, size: Sequence[float]) -> Iterator[tuple[Action, float]]:
    """Yield (action, what the rank holds while it runs), in the rank's order.

    A stage holds a microbatch from its forward to its last backward action: B, or W where backwards
    are split (the queued weight gradients keep the inputs of their contractions).
    """
    last = "W" if schedule.splits else "B"
    now: float = 0
    for action in schedule.ranks[rank]:
        now += size[action.stage] if action.kind == "F" else 0
        yield action, now
        now -= size[action.stage] if action.kind == last else 0


def peak_live(schedule: Schedule, size: Sequence[float] | None = None) -> tuple[float, ...]:
    """Return per rank the most that it holds at one time; the order alone decides, not the timing.

    Args:
        schedule: a valid schedule.
        size: per stage, what one microbatch's activations count, say in bytes; 1 unless given, so
            that a rank with v stages counts v per microbatch.

    >>> from megatree.parallel.schedule.fill_drain import one_f_one_b
    >>> peak_live(one_f_one_b(4, 8))
    (4, 3, 2, 1)
    """
    sizes = (1,) * schedule.num_stages if size is None else tuple(size)
    if len(sizes) != schedule.num_stages:
        raise ValueError(
            f"peak_live: {len(sizes)} sizes for {schedule.num_stages} stages. Give one per stage."
        )
    return tuple(
        max((now for _, now in held(schedule, rank, sizes)), default=0)
        for rank in range(schedule.num_ranks)
    )
