"""Metrics files and learning rates: the small laws of a run's records."""

from pathlib import Path

import pytest

from megatree.recipes import metrics
from megatree.recipes.optimizer_config import LrConfig


def test_going_on_drops_the_lines_of_steps_to_come(tmp_path: Path) -> None:
    """A run that was killed after its last checkpoint would else report those steps twice."""
    for step in range(1, 6):
        metrics.append(str(tmp_path), "step", {"step": step, "loss": step / 2})
    with open(tmp_path / metrics.METRICS_FILE, "a", encoding="utf-8") as stream:
        stream.write('{"kind": "step", "st')  # cut short by a kill
    metrics.keep_up_to(str(tmp_path), 3)
    metrics.append(str(tmp_path), "step", {"step": 4, "loss": 2.0})
    assert [line["step"] for line in metrics.read(str(tmp_path))] == [1, 2, 3, 4]


def test_a_run_without_metrics_has_none_to_drop(tmp_path: Path) -> None:
    metrics.keep_up_to(str(tmp_path), 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("steps", [1, 2, 11, 50])
def test_the_rate_stays_between_its_ends(warmup: int, steps: int) -> None:
    schedule = LrConfig(warmup_steps=warmup).resolve(1.0, 0.1, steps)
    rate = schedule.by_step()
    rates = [rate(step) for step in range(steps)]
    assert all(0.0 < r <= 1.0 for r in rates)
    rise, fall = rates[: warmup + 1], rates[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    if steps > warmup:
        assert rates[warmup] == pytest.approx(1.0)
        assert rate(steps) == pytest.approx(0.1)
