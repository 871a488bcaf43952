"""The loop reads, reports, evaluates and saves when it says it does."""

from pathlib import Path

import numpy as np
import pytest

from megatree.io.checkpoint import step_name
from megatree.io.data import Loader
from megatree.io.world import World
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.processes import world_of_group
from megatree.runtime.train import Loop, begin, evaluate, find_checkpoint, share_of, train
from tests.ranks import ranks
from tests.runtime.tiny_step import BATCH, SEQ, Watched, tiny_data, tiny_step

WORLD = World.single()


def test_a_step_takes_the_next_samples_microbatch_by_microbatch() -> None:
    step, data = tiny_step(Layout()), Watched(tiny_data())
    loop = Loop(steps=2, global_batch=3 * BATCH, microbatch=BATCH)
    start = begin(step, "", data=data, world=WORLD)
    end = train(step, start, loop, data=data, lr=float, world=WORLD)
    assert data.reads == [(at, BATCH, (0, BATCH)) for at in range(0, 6 * BATCH, BATCH)]
    assert end.consumed == 6 * BATCH
    assert end.state.step == 2


def test_reports_come_when_they_are_due(tmp_path: Path) -> None:
    step, data, heard = tiny_step(Layout()), tiny_data(), []
    loop = Loop(
        steps=5,
        global_batch=BATCH,
        microbatch=BATCH,
        log_every=2,
        eval_every=4,
        save_every=3,
        directory=str(tmp_path),
    )
    train(
        step,
        begin(step, "", data=data, world=WORLD),
        loop,
        data=data,
        lr=lambda at: at / 10,
        world=WORLD,
        valid=lambda: 1.5,
        report=lambda kind, fields: heard.append((kind, dict(fields))),
    )
    assert [(kind, fields["step"]) for kind, fields in heard] == [
        ("step", 2),
        ("step", 3),
        ("saved", 3),
        ("step", 4),
        ("eval", 4),
        ("step", 5),
        ("eval", 5),
        ("saved", 5),
    ]
    last = heard[5][1]
    assert last["lr"] == 0.4
    assert last["consumed"] == 5 * BATCH
    assert last["tokens_per_s"] * last["ms"] / 1e3 == pytest.approx(BATCH * SEQ)
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(3), step_name(5)]


@ranks(2)
def test_a_rank_reads_its_rows_and_no_others() -> None:
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    step, data = tiny_step(layout, ProcessComm(layout.mesh)), Watched(tiny_data())
    with Loader(data, batch_size=BATCH, share=share_of(step, BATCH), consumed=8, prefetch=0) as it:
        batch = next(it).microbatches[0]
    rank = world_of_group().rank
    rows = (rank * BATCH // 2, (rank + 1) * BATCH // 2)
    assert data.reads == [(8, BATCH, rows)]
    whole = tiny_data().batch(8, BATCH)
    for name, part in batch.items():
        np.testing.assert_array_equal(part, whole[name][slice(*rows)])


@ranks(2)
def test_the_held_out_loss_is_that_of_one_device() -> None:
    one = tiny_step(Layout())
    one.init()
    expected = evaluate(one, tiny_data(), num_samples=3 * BATCH, microbatch=BATCH)
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    step = tiny_step(layout, ProcessComm(layout.mesh))
    step.init()
    found = evaluate(step, tiny_data(), num_samples=3 * BATCH, microbatch=BATCH)
    assert found == pytest.approx(expected, rel=1e-6)


def test_evaluation_does_not_drop() -> None:
    step = tiny_step(Layout(), dropout=0.5)
    step.init()
    plain = tiny_step(Layout())
    plain.init()
    losses = [evaluate(s, tiny_data(), num_samples=BATCH, microbatch=BATCH) for s in (step, plain)]
    assert losses[0] == losses[1]


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    step, data = tiny_step(Layout(), lr=1e20), tiny_data()
    loop = Loop(
        steps=9, global_batch=BATCH, microbatch=BATCH, save_every=1, directory=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"step \d: the loss is \S+ and the norm .* Lower the"):
        train(step, begin(step, "", data=data, world=WORLD), loop, data=data, lr=float, world=WORLD)
    assert len(list(tmp_path.iterdir())) < 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that holds checkpoints of steps 1 and 2."""
    step, data = tiny_step(Layout()), tiny_data()
    directory = str(tmp_path / "run")
    loop = Loop(steps=2, global_batch=BATCH, microbatch=BATCH, save_every=1, directory=directory)
    train(step, begin(step, "", data=data, world=WORLD), loop, data=data, lr=float, world=WORLD)
    return tmp_path / "run"


def test_where_a_run_goes_on(folder: Path) -> None:
    first, last = str(folder / step_name(1)), str(folder / step_name(2))
    assert find_checkpoint(WORLD, str(folder), "auto") == last
    assert find_checkpoint(WORLD, str(folder / "empty"), "auto") == ""
    assert find_checkpoint(WORLD, "", "auto") == ""
    assert find_checkpoint(WORLD, str(folder / "empty"), "never") == ""
    assert find_checkpoint(WORLD, str(folder / "empty"), first) == first
    assert find_checkpoint(WORLD, str(folder / "empty"), str(folder)) == last


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("never", r"run: holds checkpoints up to step_00000002, .* Remove them, save elsewhere"),
        ("absent", r"absent: no checkpoint and no folder of checkpoints\. Give one"),
        (step_name(1), r"run: holds step_00000002, which a run that goes on from .* would have"),
    ],
)
def test_a_run_that_would_replace_checkpoints_is_refused(
    folder: Path, resume: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_checkpoint(WORLD, str(folder), resume if resume == "never" else str(folder / resume))


def test_going_on_with_other_samples_is_refused(folder: Path) -> None:
    """The consumed count of other samples would silently skip some and repeat others."""
    with pytest.raises(ValueError, match=r"was trained on other samples .* so 8 consumed samples"):
        begin(tiny_step(Layout()), str(folder / step_name(2)), data=tiny_data(1), world=WORLD)
