"""Memory of a plan against storages of a step that runs: llama-1b, and its shape made smaller."""

from dataclasses import replace

import pytest
import torch

from megatree.models.gpt import gpt
from megatree.parallel.layout import Layout
from megatree.parallel.plan import Plan, plan
from megatree.recipes.presets import llama_1b
from tests.parallel.plan.measure import Held, batch, held

LLAMA_1B = llama_1b().model


def compare(made: Plan, found: Held) -> float:
    """Check a plan against what was held; return by how much the total is off."""
    stage = made.stages[0]
    assert found.parameters == stage.parameter_bytes
    assert found.gradients == stage.gradient_bytes
    assert found.optimizer == stage.optimizer_bytes
    assert found.saved == pytest.approx(stage.activation_bytes, rel=0.05)
    return stage.peak_bytes / found.total - 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str
)
def test_a_llama_of_sixteen_layers_holds_what_was_planned(dtype: torch.dtype) -> None:
    """An eighth of llama-1b in every size but the number of layers."""
    cfg = replace(
        LLAMA_1B, vocab_size=4096, seq_length=512, embed=256, kv_heads=2, ffn=704
    )  # fmt: skip
    model = gpt(cfg, batch_size=1, dtype=dtype)
    assert abs(compare(plan(model, Layout()), held(model, Layout(), batch(cfg, 1)))) < 0.01


@pytest.mark.full
def test_llama_1b_holds_what_was_planned() -> None:
    """Its own widths and vocabulary in float32, 1024 tokens; of its layers as many as fit.

    Everything that is held grows by the same bytes with each layer, so three numbers of layers
    give what all sixteen hold; the plan is made for those sixteen.
    """
    found = []
    for layers in (1, 2, 3):
        cfg = replace(LLAMA_1B, num_layers=layers, seq_length=1024)
        model = gpt(cfg, batch_size=1)
        made = plan(model, Layout())
        got = held(model, Layout(), batch(cfg, 1))
        off = compare(made, got)
        assert abs(off) < 0.05
        found.append(got.total)
        print(f"{layers} layers: held {got}, plan off by {100 * off:.2f}%")  # noqa: T201
    one, two, three = found
    assert three - two == two - one
    sixteen = one + 15 * (two - one)
    made = plan(gpt(replace(LLAMA_1B, seq_length=1024), batch_size=1), Layout())
    off = made.peak_bytes / sixteen - 1
    print(f"16 layers: held {sixteen:,}, planned {made.peak_bytes:,}, off by {100 * off:.2f}%")  # noqa: T201
    assert abs(off) < 0.05
