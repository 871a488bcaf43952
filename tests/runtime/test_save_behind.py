"""A save beside the training: the next step runs with the copy, and its update waits for it."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatree.io.checkpoint import Saver, snapshot
from megatree.io.checkpoint.memory import copy_bytes
from megatree.io.world import World
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout
from megatree.runtime import pieces
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import TrainState, TrainStep, train_step

ONE = World.single()
CFG = GPTConfig(vocab_size=20, seq_length=4, num_layers=2, embed=8, kv_heads=2, head_dim=4, ffn=12)


def make(start: str = "") -> tuple[TrainStep, TrainState, list[dict[str, torch.Tensor]]]:
    """Return a step with float32 masters, a state that has moments, and a batch.

    Args:
        start: where to save the state before; "" for nowhere.
    """
    step = train_step(gpt(CFG, batch_size=2, dtype=torch.bfloat16), Layout(), adamw(1e-1))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (2, 5), generator=draw)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "weights": torch.ones(2, 4),
    }
    state = step.init(1)
    if start:
        pieces.save(start, step, state, ONE)
    state, _ = step(state, [batch])
    return step, state, [batch]


def copied(state: TrainState) -> dict[str, dict[str, torch.Tensor]]:
    """Return everything that a step changes, as it is."""
    found = {"params": state.params, "master": state.master, **state.opt}
    return {name: {k: x.clone() for k, x in part.items()} for name, part in found.items()}


def equal(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(x, b[name][k]) for name, part in a.items() for k, x in part.items())


@pytest.mark.parametrize("then", ["a step", "a new start", "a load"])
def test_what_changes_the_state_waits_for_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Only here: an update that overtakes the copy writes half of its step into a checkpoint."""
    step, state, batch = make(str(tmp_path / "other"))
    before, waiting, go = copied(state), threading.Event(), threading.Event()
    assert before["master"], "masters are part of what is saved"

    def gated(*args: Any) -> None:
        waiting.set()
        assert go.wait(30)
        copy_bytes(*args)

    settles, settle = threading.Event(), snapshot.Snapshot.settle

    def noted(self: snapshot.Snapshot) -> None:
        settles.set()
        settle(self)

    monkeypatch.setattr(snapshot, "copy_bytes", gated)
    monkeypatch.setattr(snapshot.Snapshot, "settle", noted)
    saver, done = Saver(ONE, host_bytes=4 << 20), threading.Event()
    pieces.save(str(tmp_path / "c"), step, state, ONE, saver=saver)
    assert waiting.wait(30)
    made: list[TrainState] = []

    def main() -> None:
        if then == "a step":
            made.append(step(state, batch)[0])
        elif then == "a new start":
            made.append(step.init(2))
        else:
            made.append(pieces.load(str(tmp_path / "other"), step, ONE)[0])
        done.set()

    thread = threading.Thread(target=main)
    thread.start()
    assert settles.wait(10), "nothing waits for the copy"
    assert not done.is_set()
    held = {"params": state.weights.stored, "master": state.master, **state.opt}
    assert equal(before, held), "nothing has changed while it was copied"
    go.set()
    thread.join(30)
    assert done.is_set()
    assert not equal(before, copied(made[0]))
    saver.wait()
    fresh, _, _ = make()
    loaded, _ = pieces.load(str(tmp_path / "c"), fresh, ONE)
    assert equal(before, copied(loaded))


def test_a_step_that_is_not_held_up_reads_what_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the next step do not wait: that is what the stall is saved by."""
    step, state, batch = make()
    reached, go = threading.Event(), threading.Event()

    def gated(*args: Any) -> None:
        assert go.wait(30)
        copy_bytes(*args)

    monkeypatch.setattr(snapshot, "copy_bytes", gated)
    saver = Saver(ONE, host_bytes=4 << 20)
    pieces.save(str(tmp_path / "c"), step, state, ONE, saver=saver)
    update = TrainStep._update

    def noted(self: TrainStep, *args: Any, **kwargs: Any) -> None:
        reached.set()
        go.set()
        update(self, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "_update", noted)
    step(state, batch)
    assert reached.is_set()
    saver.wait()
