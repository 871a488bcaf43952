"""Splits: everything once, nothing twice, in Megatron's rounding."""

import hypothesis
import hypothesis.strategies as st
import pytest

from megatree.io.data import split_bounds, split_shares

WEIGHTS = st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(sum)


@hypothesis.given(weights=WEIGHTS, total=st.integers(0, 10**7))
def test_splits_are_adjacent_and_cover_everything(weights: list[int], total: int) -> None:
    bounds = [b for b in split_bounds(",".join(map(str, weights)), total) if b is not None]
    assert len(bounds) == sum(weight > 0 for weight in weights)
    ends = [0, *(end for _, end in bounds)]
    assert [start for start, _ in bounds] == ends[:-1]
    assert ends[-1] == total
    for (start, end), weight in zip(bounds, filter(None, weights), strict=True):
        assert abs((end - start) - total * weight / sum(weights)) <= 1


@pytest.mark.parametrize(
    ("split", "total", "bounds"),
    [
        ("949,50,1", 200, ((0, 190), (190, 200), (200, 200))),  # test rounds to nothing
        ("969, 30, 1", 1661, ((0, 1610), (1610, 1659), (1659, 1661))),
        ("100", 7, ((0, 7), None, None)),
        ("0.9,0,.1", 10, ((0, 9), None, (9, 10))),
        ("1,1", 5, ((0, 2), (2, 5), None)),  # 2.5 rounds to the even number
    ],
)
def test_bounds_are_those_of_megatron(split: str, total: int, bounds: tuple) -> None:
    assert split_bounds(split, total) == bounds


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0", "-1,2", "90;5;5", "1e3,1", "1,,2"])
def test_what_is_no_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"split '.*'.* 949,50,1"):
        split_shares(split)
