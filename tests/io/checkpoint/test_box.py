"""The algebra of boxes, against index arrays.

Strategies here build plain tuples: a function of the package, checked by beartype, draws from the
global random state, which hypothesis forbids inside a strategy.
"""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatree.io.checkpoint.box import (
    Box,
    elements,
    extents,
    first_gap,
    first_overlap,
    intersect,
    runs,
    slices,
    split,
    volume,
)

quick = settings(max_examples=150)


@st.composite
def boxes_of_one_array(draw, count: int) -> tuple[Box, list[Box]]:
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    ends = [st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in shape]
    edge = [
        pair.map(lambda p: (min(p), max(p)) if p[0] != p[1] else (p[0], p[0] + 1)) for pair in ends
    ]
    return tuple((0, n) for n in shape), [tuple(draw(e) for e in edge) for _ in range(count)]


def marked(frame: Box, box: Box) -> np.ndarray:
    """Return the set of elements as an array of booleans over the frame."""
    array = np.zeros(extents(frame), dtype=bool)
    array[slices(box, frame)] = True
    return array


@quick
@given(boxes_of_one_array(2))
def test_intersect_is_what_both_hold(drawn):
    frame, (a, b) = drawn
    common = intersect(a, b)
    inside = marked(frame, common) if common is not None else np.zeros(extents(frame), bool)
    np.testing.assert_array_equal(inside, marked(frame, a) & marked(frame, b))


@quick
@given(boxes_of_one_array(4))
def test_first_overlap_and_first_gap_agree_with_counting(drawn):
    frame, boxes = drawn
    counted = np.sum([marked(frame, box) for box in boxes], axis=0)
    overlap, gap = first_overlap(boxes), first_gap(frame, boxes)
    assert (overlap is not None) == bool((counted > 1).any())
    if overlap is not None:
        assert intersect(*overlap) is not None
    assert (gap is not None) == bool((counted == 0).any())
    if gap is not None:
        assert not counted[slices(gap, frame)].any()
        assert volume(gap) > 0


@quick
@given(boxes_of_one_array(1), st.integers(1, 9))
def test_split_partitions_in_order_into_at_most_the_parts_asked_for(drawn, parts):
    _, (box,) = drawn
    cut = split(box, parts)
    assert len(cut) <= parts
    assert first_overlap(cut) is None
    assert sum(map(volume, cut)) == volume(box)
    assert all(intersect(part, box) == part for part in cut)


def test_split_balances_a_leading_dim():
    sizes = [volume(part) for part in split(((0, 10), (0, 3)), 4)]
    assert sizes == [6, 9, 6, 9]
    assert len(split(((0, 2), (0, 6)), 8)) == 8


@quick
@given(boxes_of_one_array(1))
def test_runs_are_the_row_major_places_of_a_box_and_maximal(drawn):
    frame, (box,) = drawn
    places = np.arange(volume(frame)).reshape(extents(frame))[slices(box, frame)].reshape(-1)
    found = list(runs(box, frame))
    assert [place for start, stop in found for place in range(start, stop)] == places.tolist()
    assert all(stop < start for (_, stop), (start, _) in pairwise(found))


@quick
@given(boxes_of_one_array(1), st.data())
def test_elements_are_the_row_major_range_in_order(drawn, data):
    frame, _ = drawn
    start = data.draw(st.integers(0, volume(frame)))
    stop = data.draw(st.integers(start, volume(frame)))
    places = np.arange(volume(frame)).reshape(extents(frame))
    parts = elements(frame, start, stop)
    found = [place for part in parts for place in places[slices(part, frame)].reshape(-1)]
    assert found == list(range(start, stop))
    assert len(parts) <= max(1, 2 * len(frame) - 1)
