"""The planner: every type to every type, values and cotangents, on simulated ranks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatree.parallel.transitions import COLLECTIVES, Step, plan_move
from megatree.parallel.types import I, P, R, ShardType
from tests.parallel.worlds import all_types, moves_go_wrong, type_of

SIZES = {"a": 2, "b": 3}
ALL = all_types(SIZES, (12, 12))


def plan(src: ShardType, dst: ShardType) -> str:
    return " + ".join(map(str, plan_move(src, dst))) or "none"


def one_axis(state: str | int) -> ShardType:
    return type_of({"a": state}, "a", {"a": 2}, (4, 4))


def test_every_move_is_the_identity_and_its_dual_too() -> None:
    """All 27 x 27 pairs, 2 x 3 ranks: a wrong step, order or dual shows in value or cotangent."""
    pairs = list(itertools.product(ALL, ALL))
    assert (len(ALL), len(pairs)) == (27, 729)
    assert moves_go_wrong(pairs, SIZES) == []


def test_a_move_takes_at_most_two_collectives_on_two_axes() -> None:
    counts = [sum(s.is_collective for s in plan_move(a, b)) for a in ALL for b in ALL]
    assert max(counts) == 2


S0, S1 = 0, 1


@pytest.mark.parametrize(
    ("src", "dst", "forward", "backward"),
    [
        (S0, I, "all_gather(a) dim 0", "slice(a) dim 0"),
        (S0, R, "all_gather(a) dim 0", "psum_scatter(a) dim 0"),
        (I, S0, "slice(a) dim 0", "all_gather(a) dim 0"),
        (R, S0, "slice(a) dim 0", "pad(a) dim 0"),
        (S0, S1, "all_to_all(a) dim 0 -> 1", "all_to_all(a) dim 1 -> 0"),
        (P, I, "psum(a)", "none"),
        (P, R, "psum(a)", "psum(a)"),
        (P, S0, "psum_scatter(a) dim 0", "all_gather(a) dim 0"),
        (I, R, "none", "psum(a)"),
        (R, I, "none", "mask(a)"),
        (I, P, "mask(a)", "none"),
        (R, P, "mask(a)", "mask(a)"),
        (S0, P, "pad(a) dim 0", "slice(a) dim 0"),
        (S0, S0, "none", "none"),
    ],
)
def test_the_printout_of_the_planner(
    src: str | int, dst: str | int, forward: str, backward: str
) -> None:
    """The table of docs/design.md; only this test sees a plan that is right but dearer."""
    a, b = one_axis(src), one_axis(dst)
    assert (plan(a, b), plan(b.dual, a.dual)) == (forward, backward)


@pytest.mark.parametrize(
    ("src", "dst", "steps"),
    [
        # common prefixes stay
        (("ab", ""), ("a", ""), "all_gather(b) dim 0"),
        (("a", ""), ("ab", ""), "slice(b) dim 0"),
        (("ab", ""), ("a", "b"), "all_to_all(b) dim 0 -> 1"),
        # a run of one fate is one collective over one flattened axis
        (("ab", ""), ("", ""), "all_gather(a.b) dim 0"),
        (("ab", ""), ("", "ab"), "all_to_all(a.b) dim 0 -> 1"),
        (("", ""), ("ab", ""), "slice(a.b) dim 0"),
        # another order on a dim is gathered as far as needed, then cut
        (("ab", ""), ("ba", ""), "all_gather(a.b) dim 0 + slice(b.a) dim 0"),
        (("a", ""), ("ba", ""), "all_gather(a) dim 0 + slice(b.a) dim 0"),
        # an axis that goes under another waits for it
        (("a", ""), ("", "ba"), "all_gather(a) dim 0 + slice(b.a) dim 1"),
        (("a", "b"), ("", "ba"), "all_to_all(a) dim 0 -> 1"),
    ],
)
def test_plans_over_two_axes(src: tuple[str, str], dst: tuple[str, str], steps: str) -> None:
    a, b = (
        ShardType(
            (12, 12),
            torch.float64,
            tuple(map(tuple, spec)),
            tuple((axis, I) for axis in "ab" if axis not in "".join(spec)),
        )
        for spec in (src, dst)
    )
    assert plan(a, b) == steps


@pytest.mark.parametrize(
    ("src", "dst", "steps"),
    [
        ({"a": S0, "b": P}, {"a": I, "b": I}, "psum(b) + all_gather(a) dim 0"),
        ({"a": I, "b": P}, {"a": S0, "b": I}, "slice(a) dim 0 + psum(b)"),
        ({"a": P, "b": P}, {"a": S0, "b": I}, "psum_scatter(a) dim 0 + psum(b)"),
        ({"a": P, "b": P}, {"a": S0, "b": S0}, "psum_scatter(a.b) dim 0"),
        ({"a": P, "b": P}, {"a": I, "b": R}, "psum(a.b)"),
        ({"a": P, "b": I}, {"a": S0, "b": S0}, "psum_scatter(a) dim 0 + slice(b) dim 0"),
    ],
)
def test_sums_run_on_the_smallest_payload(src: dict, dst: dict, steps: str) -> None:
    """Only this test sees an all-reduce of a gathered array, which is right and n times dearer."""
    a, b = (type_of(states, "ab", SIZES, (12, 12)) for states in (src, dst))
    assert plan(a, b) == steps


def test_types_of_other_shapes_are_no_move() -> None:
    a = one_axis(I)
    b = ShardType((4, 5), a.dtype, a.spec, a.kinds)
    with pytest.raises(AssertionError, match=r"float64\[4, 4\] -> float64\[4, 5\]"):
        plan_move(a, b)


CUBE = {"a": 2, "b": 3, "c": 2}


@st.composite
def drawn_types(draw: st.DrawFn) -> ShardType:
    state = st.sampled_from([0, 1, 2, I, R, P])
    states = {axis: draw(state) for axis in CUBE}
    return type_of(states, draw(st.permutations(list(CUBE))), CUBE, (12, 12, 12))


@settings(max_examples=60)
@given(st.lists(st.tuples(drawn_types(), drawn_types()), min_size=1, max_size=4))
def test_moves_over_three_axes(pairs: list[tuple[ShardType, ShardType]]) -> None:
    """Three axes on one dim, in any order: only here a run of axes has an inside."""
    for src, dst in pairs:
        over = [axis for step in plan_move(src, dst) if step.is_collective for axis in step.axes]
        assert len(over) == len(set(over)), f"{src} -> {dst} moves an axis twice"
    assert moves_go_wrong(pairs, CUBE) == []


def test_steps_know_whether_they_communicate() -> None:
    free = ("slice", "pad", "mask")
    assert [Step(kind, ("a",)).is_collective for kind in COLLECTIVES + free] == [True] * 4 + [
        False
    ] * 3
