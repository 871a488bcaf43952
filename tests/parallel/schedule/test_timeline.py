"""Times follow from durations and needs, against a relaxation that knows no order."""

import time
from random import Random

import pytest

from megatree.parallel.schedule import (
    Action,
    Costs,
    Schedule,
    from_csv,
    gpipe,
    interleaved,
    needs,
    one_f_one_b,
    peak_live,
    timeline,
    validate,
    zero_bubble_h1,
    zero_bubble_v,
)
from tests.parallel.schedule.random_schedule import random_schedules


def relaxed(schedule: Schedule, costs: Costs) -> dict[Action, float]:
    """Start of every action: raise all starts to what precedes them until nothing changes."""
    table = costs.by_kind(schedule.num_stages, splits=schedule.splits)
    start = {action: 0.0 for row in schedule.ranks for action in row}
    changed = True
    while changed:
        changed = False
        for rank, row in enumerate(schedule.ranks):
            for n, action in enumerate(row):
                sources = [(row[n - 1], 0.0)] if n else []
                for need in needs(action, schedule.num_stages):
                    away = schedule.stage_rank[need.stage] != rank
                    sources.append((need, costs.transfer if away else 0.0))
                for source, wait in sources:
                    soonest = start[source] + table[source.kind][source.stage] + wait
                    if start[action] < soonest - 1e-12:
                        start[action], changed = soonest, True
    return start


@pytest.mark.parametrize("transfer", [0.0, 0.3])
def test_starts_are_the_least_that_precedence_allows(transfer: float) -> None:
    rng = Random(5)
    schedules = [*random_schedules(20, seed=1), one_f_one_b(4, 6), zero_bubble_v(3, 4)]
    for schedule in schedules:
        per_stage = [[rng.choice([0.5, 1.0, 2.0]) for _ in schedule.stage_rank] for _ in "FBW"]
        costs = Costs(
            forward=per_stage[0],
            input_grad=per_stage[1],
            weight_grad=per_stage[2],
            transfer=transfer,
        )
        assert timeline(schedule, costs).start == pytest.approx(relaxed(schedule, costs))


def test_a_small_timeline_by_hand() -> None:
    costs = Costs(forward=(1.0, 3.0), input_grad=2.0, weight_grad=(0.5, 1.0), transfer=0.25)
    times = timeline(one_f_one_b(2, 2), costs)
    assert [times.start[a] for a in times.schedule.ranks[0]] == [0.0, 1.0, 7.5, 13.5]
    assert [times.start[a] for a in times.schedule.ranks[1]] == [1.25, 4.25, 7.25, 10.25]
    assert times.makespan == 16.0
    assert times.busy == (7.0, 12.0)
    assert times.bubbles == (1 - 7 / 16, 1 - 12 / 16)
    assert times.bubble == 1 - 19 / 32


def test_unit_durations_make_a_whole_backward_last_two() -> None:
    whole, split = timeline(one_f_one_b(1, 1)), timeline(zero_bubble_h1(1, 1))
    assert whole.end[Action("B", 0, 0)] - whole.start[Action("B", 0, 0)] == 2
    assert split.end[Action("B", 0, 0)] - split.start[Action("B", 0, 0)] == 1
    assert whole.makespan == split.makespan == 3


def test_slow_messages_cost_a_round_trip_once() -> None:
    base, slow = timeline(one_f_one_b(4, 8)), timeline(one_f_one_b(4, 8), Costs(transfer=0.5))
    assert slow.makespan > base.makespan + 6 * 0.5 - 1e-9
    assert timeline(one_f_one_b(1, 8), Costs(transfer=9.0)).makespan == 24


def test_stages_on_one_rank_pay_no_transfer() -> None:
    schedule = from_csv("F0.0, F1.0, B1.0, B0.0")
    assert timeline(schedule, Costs(transfer=5.0)).makespan == 6


def test_live_bytes_weigh_stages() -> None:
    assert peak_live(interleaved(2, 4, 2)) == (5, 3)
    assert peak_live(gpipe(2, 3), [10, 100]) == (30, 300)
    with pytest.raises(ValueError, match=r"3 sizes for 2 stages\. Give one per stage\."):
        peak_live(gpipe(2, 3), [1, 1, 1])


def test_built_for_its_durations_a_v_stays_in_memory_and_beats_1f1b() -> None:
    rng = Random(2)
    for p, m in [(2, 5), (4, 8), (4, 16), (8, 16)]:
        for _ in range(5):
            f, b, w = (rng.uniform(0.6, 1.4) for _ in range(3))
            costs = Costs(forward=f, input_grad=b, weight_grad=w, transfer=rng.uniform(0, 0.05))
            schedule = zero_bubble_v(p, m, costs)
            validate(schedule, max_live=2 * p)
            doubled = Costs(forward=2 * f, input_grad=2 * b, weight_grad=2 * w)
            whole = timeline(one_f_one_b(p, m), doubled)
            assert timeline(schedule, costs).makespan < whole.makespan


def test_durations_of_zero_and_of_one_slow_stage_build_a_v() -> None:
    slow = [1.0] * 7 + [9.0]
    for costs in [Costs(forward=0.0), Costs(weight_grad=0.0), Costs(forward=slow)]:
        validate(zero_bubble_v(4, 6, costs), max_live=8)


@pytest.mark.parametrize(
    ("costs", "text"),
    [
        ({"forward": (1.0, 2.0)}, "Costs: forward has 2 durations for 4 stages. Give one per"),
        ({"weight_grad": [1.0] * 5}, "Costs: weight_grad has 5 durations for 4 stages. Give one"),
        ({"input_grad": (1.0, -2.0)}, "Costs: input_grad of -2.0. Give a duration of at least 0."),
        ({"transfer": float("nan")}, "Costs: transfer of nan. Give a duration of at least 0."),
    ],
)
def test_bad_durations_are_refused(costs: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        timeline(one_f_one_b(4, 4), Costs(**costs))


def test_thousands_of_stages_take_seconds() -> None:
    """4096 stages are checked and timed in a second; a quadratic step would take minutes."""
    schedule = one_f_one_b(4096, 4)
    begin = time.process_time()
    validate(schedule)
    times = timeline(schedule)
    assert time.process_time() - begin < 10
    assert times.makespan == 3 * (4096 + 4 - 1)
