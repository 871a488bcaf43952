"""The loss scale grows and shrinks by its rules, and a resume continues them."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from megatree.parallel.loss_scale import DynamicLossScale, LossScaleState, StaticLossScale


def run(scaling: DynamicLossScale, story: str) -> list[float]:
    """Return the scale after every step: "." a good one, "x" an overflow."""
    state, scales = scaling.start(), []
    for step in story:
        state = scaling.after(state, overflow=step == "x")
        scales.append(state.scale)
    return scales


def test_defaults_are_those_of_fp16_training() -> None:
    scaling = DynamicLossScale()
    assert scaling.start() == LossScaleState(scale=2.0**32, good=0, tolerance=2)
    assert run(scaling, "xxx") == [2.0**32, 2.0**31, 2.0**30]
    assert run(scaling, "." * 1000)[-2:] == [2.0**32, 2.0**33]


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        ("......", [8, 8, 16, 16, 16, 32]),
        # an overflow starts the count of good steps anew
        ("..x...", [8, 8, 8, 8, 8, 16]),
        # the first overflow is forgiven, the second is not, nor any after it until growth
        ("xxx", [8, 4, 2]),
        ("x..x..x", [8, 8, 8, 4, 4, 4, 2]),
        # growth forgives again
        ("xx...xx", [8, 4, 4, 4, 8, 8, 4]),
        # not below the least
        ("xxxxx", [8, 4, 2, 2, 2]),
    ],
)
def test_stories(story: str, expected: list[float]) -> None:
    scaling = DynamicLossScale(initial=8.0, least=2.0, window=3, hysteresis=2)
    assert run(scaling, story) == expected


@given(story=st.text("..x", max_size=40), at=st.integers(0, 40))
def test_a_resume_continues_it(story: str, at: int) -> None:
    scaling = DynamicLossScale(initial=2.0**10, window=4)
    state = scaling.start()
    for i, step in enumerate(story):
        if i == at:
            state = LossScaleState.from_json(json.loads(json.dumps(state.to_json())))
        state = scaling.after(state, overflow=step == "x")
    assert state.scale == (run(scaling, story) or [2.0**10])[-1]


def test_a_static_scale_stays() -> None:
    scaling = StaticLossScale(scale=128.0)
    state = scaling.after(scaling.after(scaling.start(), overflow=True), overflow=False)
    assert state == scaling.start()
    assert state.scale == 128.0


def test_fields_of_another_version_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a state of \['scale'\], not of \['good', 'scale', 't"):
        LossScaleState.from_json({"scale": 1.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": 0.5}, r"loss_scale\.initial: 0\.5 is below least 1\. Set initial to 1"),
        ({"least": 0.0}, r"loss_scale\.least: 0\.0 is no positive number"),
        ({"window": 0}, r"window 0 and hysteresis 2 count steps"),
        ({"backoff": 1.0}, r"backoff 1\.0 between 0 and 1"),
    ],
)
def test_numbers_out_of_range_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicLossScale(**fields)


def test_a_static_scale_of_infinity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_scale\.scale: inf is no positive number"):
        StaticLossScale(scale=float("inf"))
