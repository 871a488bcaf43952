"""A bad schedule is refused with its grid, the guilty cell marked."""

import re
from random import Random

import pytest

from megatree.parallel.schedule import (
    Action,
    Schedule,
    from_csv,
    interleaved,
    one_f_one_b,
    timeline,
    validate,
    zero_bubble_h1,
)
from tests.parallel.schedule.random_schedule import random_schedules

GOOD = """
F0.0, F0.1, B0.0, B0.1
F1.0, B1.0, F1.1, B1.1
"""


def refusal(schedule: Schedule, **bounds: object) -> str:
    with pytest.raises(ValueError, match="schedule: ") as error:
        validate(schedule, **bounds)  # pyrefly: ignore
    return str(error.value)


def test_random_valid_schedules_pass() -> None:
    for schedule in random_schedules(100, seed=0):
        validate(schedule)


def test_any_one_action_left_out_or_doubled_is_seen() -> None:
    for schedule in [one_f_one_b(3, 4), interleaved(2, 2, 2), zero_bubble_h1(2, 3)]:
        for rank, row in enumerate(schedule.ranks):
            for n, action in enumerate(row):
                for text, changed in [
                    ("is missing", row[:n] + row[n + 1 :]),
                    ("is there more than once", (*row, action)),
                ]:
                    ranks = (*schedule.ranks[:rank], changed, *schedule.ranks[rank + 1 :])
                    assert f"{action} " in refusal(Schedule(ranks, schedule.stage_rank))
                    assert text in refusal(Schedule(ranks, schedule.stage_rank))


def test_any_wrong_order_is_seen() -> None:
    """Every swap of two neighbours is refused, or leaves an order that has no cycle."""
    refused = 0
    for schedule in [one_f_one_b(3, 4), interleaved(2, 4, 2), zero_bubble_h1(3, 4)]:
        for rank, row in enumerate(schedule.ranks):
            for n in range(len(row) - 1):
                changed = (*row[:n], row[n + 1], row[n], *row[n + 2 :])
                ranks = (*schedule.ranks[:rank], changed, *schedule.ranks[rank + 1 :])
                swapped = Schedule(ranks, schedule.stage_rank)
                if completes(swapped):
                    validate(swapped)
                else:
                    assert "[" in refusal(swapped)
                    refused += 1
    assert refused == 16


def completes(schedule: Schedule) -> bool:
    """Whether rows and needs together have no cycle: take sources away until none is left."""
    after: dict[Action, set[Action]] = {}
    for row in schedule.ranks:
        for n, action in enumerate(row):
            kind, stage, i = action
            sources = {row[n - 1]} if n else set()
            if kind == "F" and stage:
                sources.add(Action("F", stage - 1, i))
            if kind == "B":
                sources.add(Action("F", stage, i))
                if stage < schedule.num_stages - 1:
                    sources.add(Action("B", stage + 1, i))
            if kind == "W":
                sources.add(Action("B", stage, i))
            after[action] = sources
    while free := [a for a, sources in after.items() if not sources & after.keys()]:
        for action in free:
            del after[action]
    return not after


def test_a_deadlock_names_who_waits_for_whom() -> None:
    text = refusal(from_csv("F0.0, B0.0, F0.1, B0.1\nF1.0, F1.1, B1.0, B1.1"))
    assert text == (
        "schedule: deadlock, ranks wait in a circle: rank 0 at B0.0 for B1.0, rank 1 at F1.1 for "
        "F0.1. Move F0.1 before B0.0 on rank 0.\n"
        "  rank 0 |  F0.0  [B0.0]  F0.1   B0.1\n"
        "  rank 1 |  F1.0  [F1.1]  B1.0   B1.1"
    )


def test_a_backward_before_its_forward_is_marked() -> None:
    text = refusal(from_csv("F0.0, F0.1, B0.0, B0.1\nB1.0, F1.0, F1.1, B1.1"))
    assert text == (
        "schedule: rank 1 runs B1.0 before F1.0, which it needs. Move F1.0 before B1.0.\n"
        "  rank 0 |  F0.0   F0.1   B0.0   B0.1\n"
        "  rank 1 | [B1.0]  F1.0   F1.1   B1.1"
    )


def test_an_action_left_out_is_marked_at_the_rows_end() -> None:
    text = refusal(from_csv("F0.0, F0.1, B0.0, B0.1\nF1.0, B1.0, F1.1"))
    assert text == (
        "schedule: B1.1 at place 3 of rank 1 is missing. Add it to the row.\n"
        "  rank 0 |  F0.0   F0.1   B0.0   B0.1\n"
        "  rank 1 |  F1.0   B1.0   F1.1  [?]"
    )


def test_actions_on_another_rank_than_their_stage_are_marked() -> None:
    ranks = from_csv(GOOD).ranks
    text = refusal(Schedule(ranks, (1, 0)))
    assert text.startswith(
        "schedule: F0.0 at place 0 of rank 0 belongs to stage 0, which rank 1 holds. Move it to "
        "rank 1, or change stage_rank. So are: F0.1 on rank 0, B0.0 on rank 0,"
    )
    assert "  rank 0 | [F0.0] [F0.1] [B0.0] [B0.1]" in text


def test_stages_and_kinds_that_do_not_exist_are_marked() -> None:
    good = from_csv(GOOD)
    lost = Schedule((good.ranks[0], (*good.ranks[1], Action("F", 2, 0))), good.stage_rank)
    assert refusal(lost).startswith(
        "schedule: F2.0 at place 4 of rank 1 names no stage of the 2. Use stages 0..1, or extend"
    )
    odd = Schedule((good.ranks[0], (*good.ranks[1], Action("X", 1, 0))), good.stage_rank)  # pyrefly: ignore
    assert "X1.0 at place 4 of rank 1 is no action. Write F, B or W" in refusal(odd)
    assert "rank 1 |  F1.0   B1.0   F1.1   B1.1  [X1.0]" in refusal(odd)


def test_an_empty_schedule_is_refused() -> None:
    assert refusal(Schedule(((),), (0,))) == (
        "schedule: there is no action. Give every stage an F and a B."
    )


def test_a_microbatch_too_many_alive_is_marked() -> None:
    text = refusal(one_f_one_b(2, 4), max_live=1)
    assert text == (
        "schedule: F0.1 at place 1 of rank 0 is one live microbatch more than the 1 allowed. "
        "Run a B before it, or allow rank 0 the 2 that it comes to hold.\n"
        "  rank 0 |  F0.0  [F0.1]  B0.0   F0.2   B0.1   F0.3   B0.2   B0.3\n"
        "  rank 1 |  F1.0   B1.0   F1.1   B1.1   F1.2   B1.2   F1.3   B1.3"
    )
    validate(one_f_one_b(2, 4), max_live=(2, 1))
    assert "max_live has 3 bounds for 2 ranks" in refusal(one_f_one_b(2, 4), max_live=(1, 1, 1))


def test_weight_gradients_keep_a_microbatch_alive() -> None:
    schedule = from_csv("F0.0, B0.0, F0.1, B0.1, W0.0, W0.1")
    assert "F0.1" in refusal(schedule, max_live=1)
    validate(from_csv("F0.0, B0.0, W0.0, F0.1, B0.1, W0.1"), max_live=1)


def test_a_long_schedule_shows_the_place_of_the_error_only() -> None:
    rows = [list(row) for row in one_f_one_b(64, 40).ranks]
    rows[30][40], rows[30][41] = rows[30][41], rows[30][40]
    at = rows[30].index(Action("B", 30, 5))
    rows[30].insert(0, rows[30].pop(at))
    text = refusal(Schedule(tuple(map(tuple, rows)), tuple(range(64))))
    assert "[B30.5]" in text
    lines = text.splitlines()[1:]
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 100
    assert re.search(r"rank 30 \| +\[B30\.5\]", text)
    assert text.splitlines()[1] == text.splitlines()[-1] == "  ..."


def test_timeline_refuses_a_deadlock_as_validate_does() -> None:
    bad = from_csv("F0.0, B0.0, F0.1, B0.1\nF1.0, F1.1, B1.0, B1.1")
    with pytest.raises(ValueError, match="deadlock") as error:
        timeline(bad)
    assert str(error.value) == refusal(bad)


def test_a_rank_without_a_stage_and_a_stage_without_a_rank_are_refused() -> None:
    row = from_csv("F0.0, B0.0").ranks[0]
    with pytest.raises(ValueError, match=r"1 stages leave ranks \[1\] of 2 without a stage"):
        Schedule((row, ()), (0,))
    with pytest.raises(ValueError, match="stage 1 is on rank 2, but there are 1 ranks"):
        Schedule((row,), (0, 2))


def test_random_rows_are_refused_or_complete() -> None:
    """Shuffled rows: `validate` agrees with the plain search for a cycle."""
    rng, verdicts = Random(3), set()
    for _ in range(300):
        base = one_f_one_b(2, 2)
        ranks = tuple(tuple(rng.sample(row, len(row))) for row in base.ranks)
        schedule = Schedule(ranks, base.stage_rank)
        verdicts.add(completes(schedule))
        if completes(schedule):
            validate(schedule)
        else:
            refusal(schedule)
    assert verdicts == {True, False}
