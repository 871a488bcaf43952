"""The demo passes only if the losses are what they must be, on the meshes it says."""

from dataclasses import replace
from typing import Any

import pytest

from megatree.cli.main import main
from megatree.recipes.demo import TARGET, Outcome, Phase, demo_configs, text_entropy
from megatree.recipes.presets import demo

GOOD = Phase(first_step=0, before=6.2, after=2.8, valid_loss=2.9)
DIFFER = "the fixed batch's losses differ"
THEN = Phase(first_step=300, before=2.8000001, after=2.7, valid_loss=2.7)


def outcome(*, full: bool = True, **changes: Any) -> Outcome:
    return Outcome(phases=(GOOD, replace(THEN, **changes)), sample="", full=full)


@pytest.mark.parametrize(
    ("made", "failures"),
    [
        (outcome(), []),
        (outcome(valid_loss=TARGET), []),
        (outcome(valid_loss=3.21), ["the held-out loss is 3.2100, above 3.2."]),
        (outcome(valid_loss=float("nan")), ["the held-out loss is nan, above 3.2."]),
        (outcome(before=2.80002), [f"{DIFFER} by 2.00e-05, more than 1e-05."]),
        (outcome(before=float("nan")), [f"{DIFFER} by nan, more than 1e-05."]),
        (outcome(full=False, valid_loss=5.0), []),
        (outcome(full=False, before=9.0), [f"{DIFFER} by 6.20e+00, more than 1e-05."]),
    ],
)
def test_what_fails_the_demo(made: Outcome, failures: list[str]) -> None:
    assert made.failures == failures


def test_the_two_phases_are_one_run_on_two_meshes() -> None:
    first, second = demo_configs("somewhere", 20)
    assert first.mesh.sizes == {"dp": 1, "tp": 2}
    assert first.rules["seq_res"] == ("cp", "tp")
    assert second.mesh.sizes == {"dp": 2, "tp": 1}
    assert second == replace(first, mesh=second.mesh, rules=second.rules)
    assert first.train.steps == 20
    assert demo_configs("somewhere")[0].train.steps == demo().train.steps
    assert first.checkpoint.dir == "somewhere"


def test_the_text_has_the_entropy_that_is_quoted() -> None:
    tokens, entropy = text_entropy()
    assert tokens == 1_796_166
    assert entropy == pytest.approx(5.3, abs=0.01)


@pytest.mark.full
def test_a_short_demo_passes_and_says_what_it_did_not_check(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--steps", "4"]) == 0
    out, err = capfd.readouterr()
    flat = " ".join(out.split())
    assert err == ""
    assert "Collectives of blocks.dense" in flat
    assert "their unigram entropy is 5.300 nats" in flat
    assert "Training on 2 processes: dp=1 tp=2, sequence parallel" in flat
    assert "Going on in 2 new processes: dp=2 tp=1" in flat
    assert "It is a truth universally acknowledged, that" in flat
    assert "too few steps for the target of 3.2, which is not checked" in flat
    assert flat.endswith("passed")
