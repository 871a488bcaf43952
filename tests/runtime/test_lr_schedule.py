"""The learning rate and the weight decay are what their formulas say, at every point."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from megatree.runtime.batch_ramp import BatchRamp
from megatree.runtime.lr_schedule import (
    DecaySchedule,
    Fraction,
    Samples,
    Steps,
    lr_schedule,
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # n:                       0    10   20   30   60    100  101
        ({"decay": "constant"}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"decay": "linear"}, [0.0, 0.5, 1.0, 0.8875, 0.55, 0.1, 0.1]),
        # (1 + cos(pi / 8)) / 2 = 0.961939766
        ({"decay": "cosine"}, [0.0, 0.5, 1.0, 0.965745790, 0.55, 0.1, 0.1]),
        # sqrt(20 / n): 0.816496581, 0.577350269, 0.447213595
        (
            {"decay": "inverse_square_root"},
            [0.0, 0.5, 1.0, 0.816496581, 0.577350269, 0.447213595, 0.1],
        ),
        ({"decay": "inverse_square_root", "min_lr": 0.5},
         [0.0, 0.5, 1.0, 0.816496581, 0.577350269, 0.5, 0.5]),
        ({"decay": "linear", "init_lr": 0.2}, [0.2, 0.6, 1.0, 0.8875, 0.55, 0.1, 0.1]),
        ({"decay": "linear", "warmup": None}, [1.0, 0.91, 0.82, 0.73, 0.46, 0.1, 0.1]),
    ],
)  # fmt: skip
def test_shapes(options: dict[str, Any], expected: list[float]) -> None:
    options = {"min_lr": 0.1, "warmup": Steps(20), **options}
    rate = lr_schedule(1.0, length=Steps(100), **options)
    got = [rate.value(n) for n in (0, 10, 20, 30, 60, 100, 101)]
    assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # n:             20   60   70       80       100  101; q = 0, 1/4, 1/2, 1
        ("linear", [1.0, 1.0, 0.775, 0.55, 0.1, 0.1]),
        # (1 + cos(pi / 4)) / 2 = 0.853553391
        ("cosine", [1.0, 1.0, 0.868198052, 0.55, 0.1, 0.1]),
        # 2 * 0.5**0.25 - 1 = 0.681792831; 2 * 0.5**0.5 - 1 = 0.414213562
        ("exponential", [1.0, 1.0, 0.713613548, 0.472792206, 0.1, 0.1]),
        # 1 - sqrt(1/4) = 0.5; 1 - sqrt(1/2) = 0.292893219
        ("minus_sqrt", [1.0, 1.0, 0.55, 0.363603897, 0.1, 0.1]),
    ],
)
def test_wsd_stays_then_comes_down(shape: Any, expected: list[float]) -> None:
    rate = lr_schedule(
        1.0,
        decay="wsd",
        length=Steps(100),
        warmup=Steps(20),
        min_lr=0.1,
        anneal=Fraction(0.4),
        anneal_shape=shape,
    )
    got = [rate.value(n) for n in (20, 60, 70, 80, 100, 101)]
    assert got == pytest.approx(expected, abs=1e-9)


def test_gpt3_175b() -> None:
    """Warm-up over 0.001 of 430000 steps, 430, then a cosine from 6e-5 to 6e-6."""
    rate = lr_schedule(6e-5, length=Steps(430_000), warmup=Fraction(0.001), min_lr=6e-6)
    assert rate.warmup == 430
    values = {0: 0.0, 43: 6e-6, 215: 3e-5, 430: 6e-5, 215_215: 3.3e-5, 430_000: 6e-6, 10**6: 6e-6}
    for n, expected in values.items():
        assert rate.value(n) == pytest.approx(expected, rel=1e-12), n


@given(
    batch=st.integers(1, 2000),
    length=st.integers(2, 10_000),
    share=st.floats(0.0, 0.9),
    decay=st.sampled_from(["linear", "cosine", "wsd"]),
    at=st.floats(0.0, 1.2),
)
def test_counting_by_samples_of_one_batch_size_is_counting_by_steps(
    batch: int, length: int, share: float, decay: Any, at: float
) -> None:
    step, anneal = round(at * length), Fraction(0.1) if decay == "wsd" else None
    options: dict[str, Any] = {"decay": decay, "warmup": Fraction(share), "anneal": anneal}
    steps = lr_schedule(3e-4, length=Steps(length), **options)
    samples = lr_schedule(3e-4, length=Samples(length * batch), **options)
    rate = samples.by_step(BatchRamp.constant(batch).consumed)
    assert rate(step) == pytest.approx(steps.by_step()(step), rel=1e-9, abs=1e-15)


def test_counting_by_samples_follows_a_growing_batch() -> None:
    ramp = BatchRamp(start=2, increment=2, samples=12, final=6)
    rate = lr_schedule(1.0, decay="linear", length=Samples(20)).by_step(ramp.consumed)
    assert [rate(step) for step in range(6)] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.5, 0.3])


def test_counting_samples_needs_to_know_how_many_a_step_takes() -> None:
    """Taken for steps, samples would end the schedule after a batch size's share of the run."""
    with pytest.raises(ValueError, match=r"lr_schedule: counts samples, .* Give samples_before="):
        lr_schedule(1.0, length=Samples(20)).by_step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": Samples(5)}, r"length Steps\(count=9\), warmup Samples\(count=5\) are in two"),
        ({"warmup": Steps(9)}, r"warmup: 9 steps leave nothing of 9\. Give less than 9"),
        ({"warmup": Steps(-1)}, r"warmup: -1 is negative"),
        ({"warmup": Fraction(1.5)}, r"warmup: 1\.5 is no share"),
        ({"min_lr": 2.0}, r"min_lr: 2\.0 is not between 0 and lr 1\.0"),
        ({"init_lr": -2.0}, r"init_lr: -2\.0 is not between 0 and lr 1\.0"),
        ({"length": None}, r"length: 'cosine' comes down to min_lr at its end, and has none"),
        ({"length": None, "decay": "constant", "warmup": Fraction(0.1)}, r"a share of 0\.1 of a"),
        ({"decay": "wsd"}, r"anneal: 0 steps of 9 with a warm-up of 0\. Give more than 0 and at"),
        ({"decay": "wsd", "anneal": Steps(8), "warmup": Steps(2)}, r"anneal: 8 .* at most 7"),
        ({"anneal": Steps(2)}, r"""anneal: a part of "wsd", and decay is 'cosine'"""),
    ],
)  # fmt: skip
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    given_too: dict[str, Any] = {"length": Steps(9), **options}
    with pytest.raises(ValueError, match=message):
        lr_schedule(1.0, **given_too)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.01, 0.0325, 0.055, 0.1, 0.1]),
        # (1 + cos(3 pi / 4)) / 2 = 0.146446609
        ("cosine", [0.01, 0.023180195, 0.055, 0.1, 0.1]),
    ],
)
def test_weight_decay_rises(shape: Any, expected: list[float]) -> None:
    decay = DecaySchedule(shape=shape, start=0.01, end=0.1, length=Steps(400))
    got = [decay.by_step()(n) for n in (0, 100, 200, 400, 500)]
    assert got == pytest.approx(expected, abs=1e-9)


def test_constant_weight_decay() -> None:
    decay = DecaySchedule(shape="constant", start=0.1, end=0.1).by_step()
    assert [decay(0), decay(10**6)] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "constant", "start": 0.0}, r"shape: constant, but start is 0\.0 and end 0\.1"),
        ({"shape": "linear", "start": 0.2}, r"from 0\.2 to 0\.1, which must rise"),
        ({"shape": "linear", "start": 0.0}, r"length: None for 'linear'"),
    ],
)
def test_contradictions_of_weight_decay_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecaySchedule(end=0.1, **options)
