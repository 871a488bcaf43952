"""The batch grows where it should, and steps, samples and resumes agree about it."""

import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from megatree.runtime.batch_ramp import BatchRamp

GPT3 = BatchRamp(start=16, increment=16, samples=5_859_375, final=1536)


@st.composite
def ramps(draw: st.DrawFn) -> BatchRamp:
    """Draw any legal ramp."""
    start, increment = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return BatchRamp(
        start=start,
        increment=increment,
        samples=draw(st.integers(1, 2000)),
        final=start + increment * draw(st.integers(0, 12)),
    )


def test_gpt3_175b() -> None:
    """95 increments over 5859375 samples: one per 61677.6 of them."""
    assert GPT3.num_increments == 95
    at = {0: 16, 61_677: 16, 61_678: 32, 123_355: 32, 123_356: 48, 5_797_697: 1504,
          5_797_698: 1520, 5_859_374: 1520, 5_859_375: 1536, 10**9: 1536}  # fmt: skip
    assert {consumed: GPT3.batch(consumed) for consumed in at} == at
    # 3855 steps of 16 are 61680 samples; then 1928 of 32 to 123376, over 123355.2
    assert GPT3.segments[:3] == ((0, 0, 16), (3855, 61_680, 32), (5783, 123_376, 48))
    assert len(GPT3.segments) == 96
    assert [GPT3.num_microbatches(consumed, 8) for consumed in (0, 61_680, 10**7)] == [2, 4, 192]


def test_the_walk_of_gpt3_is_that_of_floats_sample_by_sample() -> None:
    """start + int(consumed / (samples / increments)) * increment, final once beyond samples."""
    consumed = steps = 0
    while consumed <= 6_000_000:
        per = 5_859_375 / 95
        batch = 1536 if consumed > 5_859_375 else 16 + int(consumed / per) * 16
        assert GPT3.batch(consumed) == batch, consumed
        assert GPT3.consumed(steps) == consumed
        assert GPT3.step(consumed) == steps
        consumed, steps = consumed + batch, steps + 1


@given(ramp=ramps(), step=st.integers(0, 400))
def test_a_step_starts_where_the_one_before_ends(ramp: BatchRamp, step: int) -> None:
    before = ramp.consumed(step)
    after = before + ramp.batch(before)
    assert ramp.consumed(step + 1) == after
    assert ramp.step(before) == step
    assert ramp.num_steps(after - 1) == step
    assert ramp.start <= ramp.batch(before) <= ramp.batch(after) <= ramp.final


def test_a_jump_over_a_size_is_no_segment_of_it() -> None:
    ramp = BatchRamp(start=8, increment=8, samples=6, final=32)
    assert ramp.segments == ((0, 0, 8), (1, 8, 32))
    wide = BatchRamp(start=4, increment=1, samples=6, final=8)
    assert wide.segments == ((0, 0, 4), (1, 4, 6), (2, 10, 8))


def test_a_constant_batch() -> None:
    ramp = BatchRamp.constant(12)
    assert [ramp.batch(0), ramp.consumed(5), ramp.step(60), ramp.num_steps(71)] == [12, 60, 5, 5]
    assert ramp.segments == ((0, 0, 12),)


def test_samples_of_another_ramp_are_refused() -> None:
    ramp = BatchRamp(start=2, increment=2, samples=12, final=6)
    with pytest.raises(
        ValueError,
        match=r"7 consumed samples are no whole number of steps; 3 steps take 6, 4 .* 10",
    ):
        ramp.step(7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((16, 24, 100, 1536),
         r"increment: 24 does not divide the way from 16 to 1536 \(8 are left over\)\. "
         r"Set increment to 20, or final to 1528"),
        ((64, 16, 100, 32), r"start: 64 is not between 1 and final 32\. Set start to at most 32"),
        ((0, 16, 100, 32), r"start: 0 is not between"),
        ((16, 0, 100, 32), r"increment 0 and samples 100 never get from 16 to 32"),
        ((16, 16, 0, 32), r"increment 16 and samples 0 never get from 16 to 32"),
    ],
)  # fmt: skip
def test_ramps_that_go_nowhere_are_refused(fields: tuple[int, int, int, int], message: str) -> None:
    start, increment, samples, final = fields
    with pytest.raises(ValueError, match=message):
        BatchRamp(start=start, increment=increment, samples=samples, final=final)


@pytest.mark.parametrize(
    ("microbatch", "message"),
    [
        (32, r"start: 16 makes a batch of 16 sequences, no whole number of microbatches of 32\. "
             r"Set start to 32, or microbatch to 16"),
        (12, r"start: 16 makes a batch of 16 .* Set start to 24, or microbatch to 4"),
        (0, r"microbatch: 0\. Give at least 1"),
    ],
)  # fmt: skip
def test_microbatches_that_do_not_divide_are_refused(microbatch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT3.num_microbatches(0, microbatch)


def test_an_increment_that_does_not_divide_is_refused_before_it_is_reached() -> None:
    ramp = BatchRamp(start=16, increment=12, samples=1000, final=40)
    with pytest.raises(
        ValueError,
        match=r"increment: 12 makes a batch of 28 .* of 8\. Set increment to 16, or .* 4",
    ):
        ramp.num_microbatches(0, 8)


def test_ramps_and_schedules_need_no_torch() -> None:
    """`megatree plan` prints them on machines that have none loaded."""
    modules = ("runtime.batch_ramp", "runtime.lr_schedule", "parallel.loss_scale")
    code = "import sys; " + "; ".join(f"import megatree.{name}" for name in modules)
    code += "; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
