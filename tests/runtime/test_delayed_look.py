"""Steps that are looked at late: none reads the device, and what is wrong is named the same."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatree.io.checkpoint import step_name
from megatree.io.data import Stream
from megatree.io.world import World
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.health import Health
from megatree.runtime.later import Later
from megatree.runtime.signals import StopRequest
from megatree.runtime.step import TrainStep
from megatree.runtime.train import Care, Loop, Progress, begin, train
from tests.runtime.tiny_step import BATCH, tiny_data, tiny_step

WORLD = World.single()


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: `item`, `bool`, shapes made of data."""

    WAITS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
    )
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_ahead_reads_nothing(dropout: float) -> None:
    step = tiny_step(Layout(), dropout=dropout)
    state = step.init()
    batches = [step.local(tiny_data().batch(0, BATCH))]
    counts = []
    for ahead in (True, False):
        with Reads() as seen:
            state, _ = step(state, batches, ahead=ahead)
        counts.append(seen.count)
    assert counts == [0, 1], "at once it reads the weight of the loss"


def loop_of(*, steps: int = 7, **fields: Any) -> Loop:
    return Loop(steps=steps, global_batch=BATCH, microbatch=BATCH, log_every=100, **fields)


def go(delay: int, data: Any, loop: Loop, step: TrainStep | None = None, **care: Any) -> Progress:
    step = step or tiny_step(Layout())
    health = Health(delay=delay, **care.pop("health", {}))
    start = begin(step, "", data=data, world=WORLD)
    return train(
        step, start, loop, data=data, lr=float, world=WORLD, care=Care(health=health, **care)
    )


def test_a_loop_with_a_delay_waits_for_no_number() -> None:
    counts = []
    for delay, steps in ((2, 7), (2, 3), (0, 7)):
        with Reads() as seen:
            go(delay, tiny_data(), loop_of(steps=steps))
        counts.append(seen.count)
    assert counts[:2] == [0, 0], "numbers come by themselves, for the report at the end too"
    assert counts[2] == 3 * 7 + 3, "a weight, a loss and a norm a step, and the report's"


def test_a_late_look_changes_no_bit() -> None:
    ends = [go(delay, tiny_data(), loop_of()).state for delay in (0, 1, 3)]
    for end in ends[1:]:
        for name, buffer in ends[0].params.items():
            assert torch.equal(buffer, end.params[name])


@dataclass
class Masked:
    """Samples of which nothing counts in some steps."""

    data: Stream
    steps: tuple[int, ...]

    @property
    def identity(self) -> str:
        return self.data.identity

    def batch(self, consumed: int, num_samples: int, *, rows: Any = None) -> dict[str, Any]:
        found = dict(self.data.batch(consumed, num_samples, rows=rows))
        if consumed // BATCH in self.steps:
            found["weights"] = np.zeros_like(found["weights"])
        return found


def error_of(delay: int, data: Any, step: TrainStep, **fields: Any) -> str:
    with pytest.raises(ValueError, match="step") as caught:
        go(delay, data, loop_of(**fields), step)
    return str(caught.value)


def test_a_step_in_which_nothing_counts_is_refused_and_changes_nothing() -> None:
    texts, left = [], []
    for delay in (0, 2):
        step = tiny_step(Layout())
        texts.append(error_of(delay, Masked(tiny_data(), (3,)), step))
        left.append({k: v.clone() for k, v in step.gradients.weights.stored.items()})
    assert texts[0] == texts[1]
    assert "loss terms ['loss'] have no weight in any of 1 microbatches" in texts[0]
    for name, buffer in left[0].items():
        assert torch.equal(buffer, left[1][name]), "steps 5 and 6 were made, without updates"


class Spoiled(Masked):
    """Samples whose weights are not finite in some steps, and so gradients."""

    def batch(self, consumed: int, num_samples: int, *, rows: Any = None) -> dict[str, Any]:
        found = dict(self.data.batch(consumed, num_samples, rows=rows))
        if consumed // BATCH in self.steps:
            weights = np.array(found["weights"])
            weights[0, 0] = np.inf
            found["weights"] = weights
        return found


def test_what_is_not_finite_is_named_as_if_looked_at_once() -> None:
    texts = [error_of(n, Spoiled(tiny_data(), (2, 3)), tiny_step(Layout())) for n in (0, 1, 3)]
    assert len(set(texts)) == 1
    assert texts[0].startswith(
        "step 3: the loss is nan and the norm of the gradients nan: gradient"
    )


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    told = error_of(
        5, Spoiled(tiny_data(), (2,)), tiny_step(Layout()), save_every=3, directory=str(tmp_path)
    )
    assert told.startswith("step 3:")
    assert not list(tmp_path.iterdir())


def test_a_request_to_stop_is_heard_late_and_by_all(tmp_path: Path) -> None:
    class Asking(Masked):
        def batch(self, consumed: int, num_samples: int, *, rows: Any = None) -> dict[str, Any]:
            if consumed == 2 * BATCH and stop.got is None:
                stop.got = signal.SIGTERM
            return self.data.batch(consumed, num_samples, rows=rows)

    for delay in (0, 2):
        stop, heard = StopRequest(()), []
        step = tiny_step(Layout())
        start = begin(step, "", data=tiny_data(), world=WORLD)
        directory = os.path.join(tmp_path, str(delay))
        end = train(
            step,
            start,
            loop_of(directory=directory),
            data=Asking(tiny_data(), ()),
            lr=float,
            world=WORLD,
            report=lambda kind, fields: heard.append((kind, fields["step"])),  # noqa: B023
            care=Care(health=Health(delay=delay), stop=stop),
        )
        assert end.state.step < 7
        assert heard[-1] == ("stopped", end.state.step)
        assert os.listdir(directory) == [step_name(end.state.step)]


def test_ranks_run_ahead_together() -> None:
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))

    def body(comm: ThreadComm) -> list[Tensor]:
        step = tiny_step(layout, comm)
        state = step.init()
        batches = [step.local(tiny_data().batch(0, BATCH))]
        bad = [{**batches[0], "weights": batches[0]["weights"] * (torch.inf if comm.rank else 1)}]
        state, _ = step(state, batches, ahead=True)
        before = [x.clone() for x in state.params.values()]
        for now in (bad, batches):
            state, metrics = step(state, now, ahead=True)
        assert state.halted is not None
        assert state.halted.item() == 1
        assert metrics.grad_norm.isfinite()
        assert all(torch.equal(a, b) for a, b in zip(before, state.params.values(), strict=True))
        return before

    first, second = Threads(layout.mesh.sizes).run(body)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_numbers_that_come_later_are_those_of_then() -> None:
    x = torch.tensor(1.5)
    later = Later({"x": x, "y": torch.tensor(2.0, dtype=torch.float64)})
    x += 1
    assert later.read() == {"x": 1.5, "y": 2.0}
