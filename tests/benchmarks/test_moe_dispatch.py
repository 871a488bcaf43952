"""The measure of dispatch: its fit, and that it runs both ways."""

import pytest

from benchmarks.moe_dispatch import Cost, exponent, measure


def test_the_fit_finds_the_power_of_a_law() -> None:
    costs = [Cost(tokens=n, ms=0.5 * n**1.25) for n in (1024, 2048, 8192)]
    assert exponent(costs) == pytest.approx(1.25, rel=1e-12)


@pytest.mark.parametrize("factor", [None, 1.25])
def test_both_ways_are_timed(factor: float | None) -> None:
    (cost,) = measure([1024], capacity_factor=factor, runs=1)
    assert cost.tokens == 1024
    assert 0 < cost.ms < 10_000
