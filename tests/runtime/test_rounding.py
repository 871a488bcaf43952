"""Stochastic rounding keeps means, draws alike on every mesh, and leaves what is exact."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from megatree.runtime import rounding
from megatree.runtime.rounding import stochastic_round

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, -123.456, 3e-6])
def test_the_mean_of_many_is_the_number(dtype: torch.dtype, value: float) -> None:
    """Two values come out, the neighbours, as often as their distance says: within 5 sigma."""
    n = 40_000
    x = torch.full((n,), value)
    y = stochastic_round(x, dtype, 3).double()
    below, above = (v.item() for v in y.unique())
    exact = x[0].double().item()
    assert below < exact < above
    share = (exact - below) / (above - below)
    sigma = (share * (1 - share) / n) ** 0.5
    assert abs((y == above).double().mean().item() - share) < 5 * sigma
    nearest = torch.tensor(value).to(dtype).double().item()
    assert nearest in (below, above)


@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_exact_stays(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    kept = stochastic_round(every.float(), dtype, 1)
    number = ~every.isnan()
    assert torch.equal(kept.view(torch.int16)[number], every.view(torch.int16)[number])
    assert kept[~number].isnan().all()


def test_beyond_the_largest_number_is_the_largest() -> None:
    x = torch.tensor([3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), -1e-45])
    y = stochastic_round(x, torch.bfloat16, 1).tolist()
    largest = torch.finfo(torch.bfloat16).max
    assert y[:4] == [largest, -largest, float("inf"), float("-inf")]
    assert y[4] != y[4]
    assert y[5] == 0.0


def test_float64_rounds_to_float32() -> None:
    x = torch.full((20_000,), 1.0 + 2.0**-25, dtype=torch.float64)
    y = stochastic_round(x, torch.float32, 5)
    assert y.unique().tolist() == [1.0, 1.0 + 2.0**-23]
    assert (y > 1).double().mean().item() == pytest.approx(0.25, abs=0.02)


@given(data=st.data())
def test_a_part_gets_the_bits_of_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    box = tuple(
        (start, data.draw(st.integers(start, n)))
        for n in shape
        for start in [data.draw(st.integers(0, n))]
    )
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = stochastic_round(x, torch.bfloat16, 11)
    part = tuple(slice(a, b) for a, b in box)
    got = stochastic_round(x[part], torch.bfloat16, 11, shape=shape, box=box)
    assert torch.equal(got, whole[part])


def test_large_arrays_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    whole = stochastic_round(x, torch.bfloat16, 2)
    monkeypatch.setattr(rounding, "CHUNK", 10)
    assert torch.equal(stochastic_round(x, torch.bfloat16, 2), whole)


def test_keys_draw_differently() -> None:
    x = torch.full((64,), 1.001)
    assert torch.equal(
        stochastic_round(x, torch.bfloat16, 1), stochastic_round(x, torch.bfloat16, 1)
    )
    assert not torch.equal(
        stochastic_round(x, torch.bfloat16, 1), stochastic_round(x, torch.bfloat16, 2)
    )


def test_small_steps_are_not_lost() -> None:
    """What nearest rounding does to training in bfloat16: steps below its distance vanish."""
    nearest = unbiased = torch.ones(4096, dtype=torch.bfloat16)
    for step in range(100):
        nearest = (nearest.float() + 1e-3).bfloat16()
        unbiased = stochastic_round(unbiased.float() + 1e-3, torch.bfloat16, step)
    assert nearest.float().mean().item() == 1.0
    assert unbiased.float().mean().item() == pytest.approx(1.1, abs=0.003)


@pytest.mark.parametrize(
    ("x", "dtype", "box", "message"),
    [
        (torch.ones(3, dtype=torch.bfloat16), torch.bfloat16, None, r"nothing is rounded"),
        (torch.ones(3), torch.float64, None, r"from torch.float32 to torch.float64"),
        (torch.ones(3), torch.bfloat16, ((1, 3),), r"box \(\(1, 3\),\) .* does not hold \[3\]"),
        (torch.ones(3), torch.bfloat16, ((1, 4),), r"an array \[3\] does not hold \[3\]"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    x: torch.Tensor, dtype: torch.dtype, box: tuple[tuple[int, int], ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stochastic_round(x, dtype, 1, shape=(3,), box=box)
