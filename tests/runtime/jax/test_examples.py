"""The examples with JAX in them run, and say what they promise."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.parallel.layout import Layout
from megatree.parallel.simulate import simulate
from megatree.runtime.jax.arrays import arrays_to_jax
from megatree.runtime.verify import distance

EXAMPLES = Path(__file__).parents[3] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import an example as a module, without its settings of JAX: this process has its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("jax.config.update", lambda name, value: None)
    return importlib.import_module(name)


@pytest.mark.full
def test_an_optax_optimizer_drives_our_parameters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load("optax_optimizer", monkeypatch).main()
    by_torch, by_jax = (
        [float(x) for x in line.strip("[]").split(",")]
        for line in capsys.readouterr().out.splitlines()
    )
    assert len(by_torch) == len(by_jax) == 5
    assert by_torch == sorted(by_torch, reverse=True)
    assert by_torch[-1] < by_torch[0] - 0.5


def test_a_jax_layer_inside_is_exact_on_simulated_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("jax_layer_inside", monkeypatch)
    w = example.mt.init(example.PARAMS, example.SIZES, seed=0, dtype=torch.float64)
    x = torch.randn(4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes = (example.PARAMS, "batch seq embed")
    alone = simulate(example.loss, Layout(), w, x, axes=axes)
    cut = simulate(example.loss, example.LAYOUT, w, x, axes=axes)
    assert distance(cut, alone) < 1e-12
    assert len(cut.program.collectives) == 5
    placed = arrays_to_jax((w, x), example.LAYOUT, axes)
    value = example.mt.to_jax(example.loss, example.LAYOUT)(*placed)
    assert abs(float(value) - alone.value.item()) < 1e-12 * float(value)


@pytest.mark.full
def test_a_jax_layer_inside_runs_on_four_processes() -> None:
    """As a user runs it: every process is a new one, with a JAX of its own."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "jax_layer_inside.py")],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *_, exact, last = done.stdout.splitlines()
    assert "loss on dp=2 tp=2: forward 1 psum; backward 1 psum; sync 3 psum." in exact
    in_torch, in_jax = (float(part.split()[-1]) for part in last.split(","))
    assert abs(in_torch - in_jax) < 1e-12 * in_torch


@pytest.mark.parametrize("name", ["jax_layer_inside", "optax_optimizer"])
def test_an_example_has_a_page_at_most(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
