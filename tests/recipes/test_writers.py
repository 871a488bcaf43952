"""TensorBoard holds every number of a report; what is not installed is refused by name."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatree.recipes.health_config import HealthConfig, LogConfig
from megatree.recipes.writers import writers


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (write,) = writers(LogConfig(tensorboard="auto"), str(tmp_path), run={})
    write("start", {"step": 0, "params": 7})
    nan = float("nan")
    for step in (1, 2):
        write("step", {"step": step, "loss": 3.0 / step, "terms": {"lm": 1.0, "z": nan}})
    write("eval", {"step": 2, "valid_loss": 2.5})
    write("saved", {"step": 2, "path": "x", "ms": 4.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags: Any = events.Tags()
    assert sorted(tags["scalars"]) == [
        "eval/valid_loss",
        "saved/ms",
        "step/loss",
        "step/terms/lm",
    ]
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 3.0), (2, 1.5)]


def test_steps_made_again_hide_those_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps, loss in ((0, (1, 2, 3), 3.0), (1, (2,), 5.0)):
        (write,) = writers(LogConfig(tensorboard=str(tmp_path)), "", run={}, step=first)
        for step in steps:
            write("step", {"step": step, "loss": loss})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 3.0), (2, 5.0)]


class Session:
    """A session of Weights & Biases that keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def test_weights_and_biases_gets_config_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    session, asked = Session(), {}

    def init(**fields: Any) -> Session:
        asked.update(fields)
        return session

    package: Any = types.ModuleType("wandb")
    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    (write,) = writers(LogConfig(wandb="tiny"), "/runs/one", run={"train": {"steps": 3}})
    write("step", {"step": 1, "loss": 2.0, "mfu": None})
    assert session.logged == [(1, {"step/loss": 2.0})]
    assert asked == {
        "project": "tiny",
        "config": {"train": {"steps": 3}},
        "dir": "/runs/one",
        "id": "one",
        "resume": "allow",
    }


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    cfg = LogConfig(tensorboard="runs") if name == "tensorboard" else LogConfig(wandb="runs")
    with pytest.raises(ValueError, match=rf"log\.{name}: the package '{name}' is not installed\."):
        writers(cfg, "", run={})


def test_nothing_asked_nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    assert writers(LogConfig(), "", run={}) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_skips": 0}, r"health: max_skips 0 and spike_window 32 count steps\. Give at least"),
        ({"spike_window": 0}, r"health: max_skips 10 and spike_window 0 count steps"),
        ({"spike_factor": 0.9}, r"health\.spike_factor: every second loss is above 0\.9 times"),
        ({"hang_s": -1.0}, r"health: invariant_every 0 and hang_s -1\.0 are lengths of time"),
        ({"stop_on": ("SIGKILL",)}, r"health\.stop_on: 'SIGKILL' is no signal that a process can"),
        ({"stop_on": ("TERM",)}, r"health\.stop_on: 'TERM' is no signal"),
        ({"invariant_every": -1}, r"health: invariant_every -1 and hang_s"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HealthConfig(**fields)


def test_a_log_config_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log\.peak_flops: -1\.0 FLOP/s\. Give a positive"):
        LogConfig(peak_flops=-1.0)
    with pytest.raises(ValueError, match=r"log\.tensorboard: 'auto' is a folder in checkpoint.dir"):
        writers(LogConfig(tensorboard="auto"), "", run={})
