"""What goes wrong in a step is named: spikes by the median, bad values by leaf and rank."""

import re
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.io.world import World
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.packing import Leaf
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.health import Health, Vitals, check_step
from megatree.runtime.recorded import RecordedComm, Recorder
from megatree.runtime.step import TrainStep
from megatree.runtime.weights import Bucket
from tests.runtime.tiny_step import BATCH, tiny_data, tiny_step
from tests.thread_worlds import threaded_worlds

WORLD = World.single()


def test_a_loss_above_a_multiple_of_the_median_is_a_spike() -> None:
    vitals = Vitals(Health(spike_factor=2.0, spike_window=3))
    assert [vitals.spike(x) for x in (1.0, 3.0)] == [None, None], "too few to judge"
    assert vitals.spike(2.0) is None
    assert vitals.spike(4.0) is None, "exactly the factor"
    told = vitals.spike(6.5)
    assert told is not None
    assert told.startswith("the loss 6.5 is 2.17 times the median 3 of the last 3 steps")
    assert list(vitals.losses) == [3.0, 2.0, 4.0], "a spike is no measure of the next loss"


def test_no_factor_no_spike() -> None:
    vitals = Vitals(Health())
    assert not any(vitals.spike(10.0**n) for n in range(40))
    assert len(vitals.losses) == 32


def test_vitals_survive_a_checkpoint() -> None:
    health = Health(spike_factor=2.0, spike_window=3)
    one, two = Vitals(health), Vitals(health)
    for loss in (1.0, 1.5, 2.0, 2.5):
        one.spike(loss)
    one.skips = 2
    two.restore(one.to_json())
    assert two == one
    assert Vitals(Health()).to_json() == {}


def spoil(step: TrainStep, unit: str, value: float) -> str:
    """Write a value into the first element of the last leaf of a unit; return its path."""
    group = next(g for g in step.groups if g.unit == unit)
    leaf = group.leaves[-1]
    row = step.gradients.weights.stored[group.name][-1]
    with torch.no_grad():
        group.whole(row, leaf).view(-1)[0] = value
    return leaf.path


def test_a_bad_parameter_is_named_on_its_rank() -> None:
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    worlds = threaded_worlds(2)

    def body(comm: ThreadComm) -> str:
        step = tiny_step(layout, comm)
        state = step.init()
        unit = next(g.unit for g in step.groups if g.layers is not None)
        path = spoil(step, unit, float("nan")) if comm.rank == 1 else ""
        batches = [step.local(tiny_data().batch(0, BATCH))]
        state, metrics = step(state, batches)
        with pytest.raises(ValueError, match="step 1: the loss is nan") as caught:
            check_step(Vitals(Health()), step, state, metrics, batches, worlds[comm.rank])
        return f"{path}|{caught.value}"

    told = Threads(layout.mesh.sizes).run(body)
    path, message = told[1].split("|")
    assert told[0] == f"|{message}"
    assert f": parameter {path} (layer 1) holds 1 nan of" in message
    assert re.search(r"values on rank 1\. Lower the learning rate", message)


def with_bad_gradient(step: TrainStep, unit: str) -> tuple[TrainStep, str]:
    """Let every gradient of the last leaf of a unit hold an inf; updates that hold one are skipped.

    Returns:
        The step and the path of the leaf.
    """
    sums = step.gradients.sums
    path = next(g for g in step.groups if g.unit == unit).leaves[-1].path
    plain = sums.add

    def add(bucket: Bucket, leaf: Leaf, grad: Tensor, *, arrivals: int = 1) -> None:
        if leaf.path == path:
            grad = grad.clone()
            grad.view(-1)[0] = float("inf")
        plain(bucket, leaf, grad, arrivals=arrivals)

    sums.add = add  # type: ignore[method-assign]
    return step, path


def skipping(step: TrainStep) -> TrainStep:
    """Return a step that makes no update with gradients that are not finite."""
    precision = replace(step.gradients.precision, skip_nonfinite=True)
    return replace(step, gradients=replace(step.gradients, precision=precision))


def test_the_rank_on_which_a_bad_gradient_began_is_named() -> None:
    """After the sum over dp both ranks hold it."""
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    worlds = threaded_worlds(2)

    def body(comm: ThreadComm) -> str:
        recorder, path = Recorder(), ""
        step = tiny_step(layout, RecordedComm(comm, recorder))
        state = step.init()
        unit = next(g.unit for g in step.groups if g.layers is not None)
        if comm.rank == 1:
            step, path = with_bad_gradient(step, unit)
        batches = [step.local(tiny_data().batch(0, BATCH))]
        state, metrics = step(state, batches)
        vitals, world = Vitals(Health()), worlds[comm.rank]
        with pytest.raises(ValueError, match="step 1: the loss is") as caught:
            check_step(vitals, step, state, metrics, batches, world, recorder=recorder)
        return f"{path}|{caught.value}"

    told = Threads(layout.mesh.sizes).run(body)
    path, message = told[1].split("|")
    assert told[0] == f"|{message}"
    assert f": gradient of {path} (layer 1) holds 1 inf of" in message, "backward is there first"
    assert re.search(
        r"values on ranks 0, 1; it began on rank 1, before psum\(dp\) of float32 .* at \S+py:\d+\.",
        message,
    )


class Spoiling(RecordedComm):
    """A comm of a rank whose sums within the model get operands that are not finite."""

    def at(self, source: str) -> "Spoiling":
        return Spoiling(self.comm, self.recorder, source)

    def psum(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        return super().psum(x * float("inf") if self.source else x, axes)


def test_a_rank_that_was_given_a_bad_value_is_not_blamed() -> None:
    """Both ranks have bad operands in the end; rank 0 has them from its second sum on."""
    layout = Layout(Mesh(tp=2), Rules(kv_heads="tp", ffn="tp", vocab="tp"))
    worlds = threaded_worlds(2)

    def body(comm: ThreadComm) -> str:
        recorder = Recorder()
        kind = Spoiling if comm.rank == 1 else RecordedComm
        step = tiny_step(layout, kind(comm, recorder))
        state, batches = step.init(), [step.local(tiny_data().batch(0, BATCH))]
        state, metrics = step(state, batches)
        vitals, world = Vitals(Health()), worlds[comm.rank]
        with pytest.raises(ValueError, match="step 1: the loss is nan") as caught:
            check_step(vitals, step, state, metrics, batches, world, recorder=recorder)
        return str(caught.value)

    told = Threads(layout.mesh.sizes).run(body)
    assert told[0] == told[1]
    assert re.search(r"it began on rank 1, before psum\(tp\) .*, forward, at models/", told[0])


def test_updates_are_skipped_up_to_a_limit() -> None:
    plain = tiny_step(Layout())
    unit = next(g.unit for g in plain.groups if g.layers is not None)
    step, path = with_bad_gradient(skipping(plain), unit)
    state = step.init()
    before = {name: x.clone() for name, x in state.params.items()}
    batches = [step.local(tiny_data().batch(0, BATCH))]
    vitals = Vitals(Health(nonfinite="skip", max_skips=2))
    for number in (1, 2):
        state, metrics = step(state, batches)
        told = check_step(vitals, step, state, metrics, batches, WORLD)
        assert told is not None
        assert path in told
        assert told.endswith(f"the update was skipped, {number} in a row")
    assert all(torch.equal(state.params[name], x) for name, x in before.items())
    state, metrics = step(state, batches)
    with pytest.raises(ValueError, match=r"step 3: the loss .*, 3 in a row\. Lower the"):
        check_step(vitals, step, state, metrics, batches, WORLD)


def test_a_good_step_ends_a_row_of_skips() -> None:
    step = skipping(tiny_step(Layout()))
    state, batches = step.init(), [step.local(tiny_data().batch(0, BATCH))]
    state, metrics = step(state, batches)
    vitals = Vitals(Health(nonfinite="skip", max_skips=2), skips=2)
    assert check_step(vitals, step, state, metrics, batches, WORLD) is None
    assert vitals.skips == 0
    assert list(vitals.losses) == [metrics.loss.item()]


def test_the_update_of_a_spike_may_be_skipped() -> None:
    """No bit moves, the step counts as skipped, and too many in a row end the run."""
    step = tiny_step(Layout())
    state, batches = step.init(), [step.local(tiny_data().batch(0, BATCH))]
    health = Health(spike_factor=1.5, spike_window=2, spike="skip", max_skips=1)
    vitals = Vitals(health, deque([1.0, 1.0]))
    assert vitals.most() == 1.5
    before = {name: x.clone() for name, x in state.params.items()}
    state, metrics = step(state, batches, most=vitals.most())
    assert metrics.skipped
    assert (state.step, state.updates) == (1, 0)
    assert all(torch.equal(x, state.params[name]) for name, x in before.items())
    told = check_step(vitals, step, state, metrics, batches, WORLD)
    assert told is not None
    assert "times the median 1 of the last 2 steps" in told
    assert told.endswith("; the update was skipped, 1 in a row")
    state, metrics = step(state, batches, most=vitals.most())
    with pytest.raises(ValueError, match=r"step 2: the loss 3\.\d+ is 3\.\d+ times the median"):
        check_step(vitals, step, state, metrics, batches, WORLD)
    state, metrics = step(state, batches, most=10.0)
    assert not metrics.skipped
    with pytest.raises(ValueError, match="a look 2 steps late cannot skip"):
        Health(spike="skip", delay=2)


@pytest.mark.parametrize("policy", ["stop", "report"])
def test_a_spike_stops_the_run_or_is_told(policy: Any) -> None:
    step = tiny_step(Layout())
    state, batches = step.init(), [step.local(tiny_data().batch(0, BATCH))]
    state, metrics = step(state, batches)
    vitals = Vitals(Health(spike_factor=1.5, spike_window=2, spike=policy), deque([1.0, 1.0]))
    if policy == "stop":
        with pytest.raises(ValueError, match=r"step 1: the loss 3\.\d+ is 3\.\d+ times the median"):
            check_step(vitals, step, state, metrics, batches, WORLD)
    else:
        told = check_step(vitals, step, state, metrics, batches, WORLD)
        assert told is not None
        assert "times the median 1 of the last 2 steps" in told
