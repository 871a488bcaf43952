"""Generators x laws: every schedule is complete and runs, has its formula's bubble and memory."""

from collections.abc import Callable

import pytest

from megatree.parallel.schedule import (
    Schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    rank_programs,
    run_blocking,
    run_fifo,
    timeline,
    validate,
    zero_bubble_h1,
    zero_bubble_v,
)

COUNTS = [(p, m) for p in (1, 2, 3, 4, 8) for m in sorted({p, p + 1, 2 * p, 2 * p + 3, 16})]
LARGE = [(p, m) for p, m in COUNTS if m >= p]


def interleaved_cases() -> list[tuple[int, int, int, int]]:
    """All (p, m, v, group) that Megatron's rule allows, of these sizes."""
    return [
        (p, m, v, group)
        for p in (1, 2, 3, 4)
        for m in range(p, 2 * p + 4)
        for v in (2, 3)
        for group in range(p, m + 1)
        if m % group == 0 or m % group >= p
    ]


def overhead(schedule: Schedule) -> float:
    """Idle time over ideal time, at unit durations, from the makespan alone."""
    per_pair = 3
    ideal = per_pair * schedule.num_microbatches * schedule.num_stages / schedule.num_ranks
    return timeline(schedule).makespan / ideal - 1


def live_by_intervals(schedule: Schedule) -> tuple[int, ...]:
    """Peak live microbatches counted from the timeline: the oracle of `peak_live`."""
    times, last = timeline(schedule), "W" if schedule.splits else "B"
    peaks = []
    for row in schedule.ranks:
        spans = [(times.start[a], times.end[a._replace(kind=last)]) for a in row if a.kind == "F"]
        peaks.append(max(sum(s <= t < e for s, e in spans) for t, _ in spans))
    return tuple(peaks)


ONE_STAGE: list[Callable[[int, int], Schedule]] = [gpipe, one_f_one_b, zero_bubble_h1]
ALL = [(g.__name__, g, p, m) for g in [*ONE_STAGE, zero_bubble_v] for p, m in COUNTS]
ALL += [(g.__name__, g, p, m) for g in [*ONE_STAGE, zero_bubble_v] for p, m in [(4, 1), (4, 3)]]


@pytest.mark.parametrize(
    ("generate", "p", "m"),
    [pytest.param(*row[1:], id=f"{row[0]}-{row[2]}-{row[3]}") for row in ALL],
)
def test_every_generator_makes_valid_schedules_whose_messages_run(
    generate: Callable[[int, int], Schedule], p: int, m: int
) -> None:
    schedule = generate(p, m)
    validate(schedule)
    assert (schedule.num_ranks, schedule.num_microbatches) == (p, m)
    assert timeline(schedule).peak_live == live_by_intervals(schedule)
    programs = rank_programs(schedule)
    run_blocking(programs)
    run_fifo(programs)


@pytest.mark.parametrize("generate", [gpipe, one_f_one_b])
def test_bubble_of_gpipe_and_1f1b_is_the_formula(
    generate: Callable[[int, int], Schedule],
) -> None:
    for p, m in [*COUNTS, (4, 1), (8, 3)]:
        assert overhead(generate(p, m)) == pytest.approx((p - 1) / m, abs=1e-12)
        assert timeline(generate(p, m)).bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


def test_gpipe_holds_every_microbatch() -> None:
    assert timeline(gpipe(4, 6)).peak_live == (6, 6, 6, 6)


def test_1f1b_holds_at_most_stages_minus_rank_microbatches() -> None:
    for p, m in [*COUNTS, (4, 1), (8, 3)]:
        bound = [p - rank for rank in range(p)]
        validate(one_f_one_b(p, m), max_live=bound)
        assert timeline(one_f_one_b(p, m)).peak_live == tuple(min(b, m) for b in bound)


def test_zb_h1_has_a_third_of_1f1bs_bubble_at_its_memory_bound() -> None:
    for p, m in LARGE:
        split, whole = zero_bubble_h1(p, m), one_f_one_b(p, m)
        assert overhead(split) == pytest.approx(overhead(whole) / 3, abs=1e-12)
        assert overhead(split) == pytest.approx((p - 1) / (3 * m), abs=1e-12)
        assert max(timeline(split).peak_live) == max(timeline(whole).peak_live) == p


@pytest.mark.parametrize(("p", "m"), [*LARGE, (12, 17), (13, 18), (16, 20), (16, 48), (32, 40)])
def test_zb_v_has_a_sixth_of_1f1bs_bubble_at_its_memory_bound(p: int, m: int) -> None:
    """The odd counts are those at which greedy rules that look as good leave a hole."""
    schedule = zero_bubble_v(p, m)
    assert timeline(schedule).makespan == 6 * m + p - 1
    assert overhead(schedule) == pytest.approx((p - 1) / (6 * m), abs=1e-12)
    validate(schedule, max_live=2 * p)
    assert schedule.stage_rank == (*range(p), *reversed(range(p)))


def test_interleaving_divides_the_bubble_by_the_virtual_stages() -> None:
    cases = interleaved_cases()
    assert len(cases) > 80
    for p, m, v, group in cases:
        schedule = interleaved(p, m, v, group)
        validate(schedule)
        assert overhead(schedule) == pytest.approx((p - 1) / (m * v), abs=1e-12)
        warmup = [2 * (p - 1 - rank) + (v - 1) * group for rank in range(p)]
        assert timeline(schedule).peak_live == tuple(min(w + 1, m * v) for w in warmup)
        assert schedule.stage_rank == tuple(s % p for s in range(p * v))


def test_every_interleaved_schedules_messages_run() -> None:
    for p, m, v, group in interleaved_cases():
        programs = rank_programs(interleaved(p, m, v, group))
        run_blocking(programs)
        run_fifo(programs)


def test_interleaved_passes_a_group_through_a_rank_stage_by_stage() -> None:
    """Megatron's table for 2 ranks, 4 microbatches, 2 virtual stages, written out."""
    rank0, rank1 = str(interleaved(2, 4, 2)).splitlines()
    assert rank0 == (
        "F0.0, F0.1, F2.0, F2.1, F0.2, B2.0, F0.3, B2.1, "
        "F2.2, B0.0, F2.3, B0.1, B2.2, B2.3, B0.2, B0.3"
    )
    assert rank1 == (
        "F1.0, F1.1, F3.0, B3.0, F3.1, B3.1, F1.2, B1.0, "
        "F1.3, B1.1, F3.2, B3.2, F3.3, B3.3, B1.2, B1.3"
    )


def test_one_virtual_stage_is_1f1b() -> None:
    assert interleaved(4, 3, 1) == one_f_one_b(4, 3)


def test_fewer_microbatches_than_ranks_still_beat_1f1b() -> None:
    for p, m in [(4, 1), (4, 3), (8, 5)]:
        whole = timeline(one_f_one_b(p, m)).makespan
        assert timeline(zero_bubble_h1(p, m)).makespan < whole
        assert timeline(zero_bubble_v(p, m)).makespan < 2 * whole


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            (4, 6, 2),
            "interleaved: 6 microbatches in groups of 4 leave a last group of 2, smaller than 4 "
            "ranks. Set group=6, or use 8 microbatches.\n"
            "  group 0 |  0   1   2   3\n"
            "  group 1 |  4   5  [?]",
        ),
        (
            (4, 3, 2),
            "interleaved: 3 microbatches for 4 ranks. Use at least 4 microbatches, or one_f_one_b, "
            "which takes any count.\n"
            "  group 0 |  0   1   2  [?]",
        ),
        (
            (4, 8, 2, 3),
            "interleaved: a group of 3 microbatches is outside 4 (ranks)..8 (microbatches). "
            "Set group=4.\n"
            "  group 0 |  0   1   2  [3]\n"
            "  group 1 |  4   5   6   7",
        ),
        (
            (4, 6, 2, 7),
            "interleaved: a group of 7 microbatches is outside 4 (ranks)..6 (microbatches). "
            "Set group=6, or use 7 microbatches.\n"
            "  group 0 |  0   1   2   3   4   5  [?]",
        ),
        ((4, 8, 0), "interleaved: 0 virtual stages. Give at least 1."),
    ],
)
def test_interleaved_refuses_counts_with_the_smallest_fix(args: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the text is compared whole
        interleaved(*args)
    assert str(error.value) == text


def test_the_fix_that_interleaved_names_works() -> None:
    for p in range(2, 7):
        for m in range(p, 4 * p):
            for group in range(1, m + 4):
                fits = p <= group <= m and (m % group == 0 or m % group >= p)
                if fits:
                    interleaved(p, m, 2, group)
                    continue
                with pytest.raises(ValueError, match="Set group=") as error:
                    interleaved(p, m, 2, group)
                fix = str(error.value).split("\n")[0].split("Set group=")[1]
                interleaved(p, m, 2, int(fix.split(",")[0].rstrip(".")))
                if "or use" in fix:
                    interleaved(p, int(fix.split("or use ")[1].split()[0]), 2, group)


@pytest.mark.parametrize("generate", [*ONE_STAGE, zero_bubble_v])
def test_no_ranks_or_no_microbatches_are_refused(
    generate: Callable[[int, int], Schedule],
) -> None:
    with pytest.raises(ValueError, match=f"{generate.__name__}: 0 ranks. Give at least 1."):
        generate(0, 4)
    with pytest.raises(ValueError, match=f"{generate.__name__}: 0 microbatches. Give at least 1."):
        generate(4, 0)
