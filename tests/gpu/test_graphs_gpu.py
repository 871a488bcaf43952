"""On one GPU: a recorded step is the step, and waits for fewer launches."""

import statistics
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout
from megatree.parallel.precision import Precision
from megatree.parallel.remat import Remat
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import TrainState, TrainStep, train_step
from tests.gpu.small import BATCH, on_gpu
from tests.gpu.small import CONFIG as SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Under torch 2.11 dynamo itself reads .grad of what it wraps.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

CONFIG = replace(SMALL, num_layers=4)
GPT2 = replace(
    CONFIG, norm="layer", positions="learned", activation="gelu_tanh", bias=True, dropout=0.1
)


def made(
    cfg: GPTConfig, layout: Layout, *, graphs: bool, compiled: bool = False, narrow: bool = False
) -> tuple[TrainStep, TrainState]:
    step = train_step(
        gpt(cfg, batch_size=BATCH, dtype=torch.bfloat16),
        layout,
        adamw(1e-3),
        comm=OneDevice("cuda"),
        precision=Precision(grads=torch.bfloat16 if narrow else None),
        transform=partial(torch.compile, dynamic=False) if compiled else lambda fn: fn,
        graphs=graphs,
    )
    return step, step.init(0)


@pytest.mark.parametrize(
    ("cfg", "layout", "counts", "compiled"),
    [
        (CONFIG, Layout(), [1] * 6, False),
        (CONFIG, Layout(), [1] * 6, True),
        (GPT2, Layout(), [2, 2, 1, 2, 1, 2, 1, 1], False),
        (replace(GPT2, dropout=0.0), Layout(remat=Remat(policy="full")), [1] * 5, True),
    ],
    ids=["eager", "compiled", "dropout, one and two microbatches", "recomputed"],
)
def test_a_recorded_step_is_the_step(
    cfg: GPTConfig, layout: Layout, counts: list[int], compiled: bool
) -> None:
    """Losses of steps on data that differs, and all parameters after them, bit for bit."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    found = []
    try:
        for graphs in (False, True):
            torch._dynamo.reset()
            narrow = set(counts) == {1}
            step, state = made(cfg, layout, graphs=graphs, compiled=compiled, narrow=narrow)
            losses = []
            for number, count in enumerate(counts):
                batches = [on_gpu(10 * number + i) for i in range(count)]
                state, metrics = step(state, batches, ahead=number % 2 == 0)
                losses.append(metrics.loss)
            if graphs:
                assert step.graphed is not None
                assert set(step.graphed._captured) == set(counts)
            found.append((torch.stack(losses), {n: x.clone() for n, x in state.params.items()}))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    (expected, params), (got, params_of_graph) = found
    assert expected.unique().numel() == len(counts)  # the data differs, and is used
    assert torch.equal(got, expected)
    for name, x in params.items():
        assert torch.equal(params_of_graph[name], x), name


def test_what_no_graph_holds_is_refused() -> None:
    step, state = made(replace(CONFIG, num_layers=1), Layout(), graphs=True)
    assert step.graphed is not None
    for _ in range(2):
        state, _ = step(state, [on_gpu(0)])

    step.graphed.gradients = _Looks(step.graphed.gradients)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="cuda_graphs: a step of 1 microbatches cannot be"):
        step(state, [on_gpu(0)])


class _Looks:
    """Gradients that read from the device."""

    def __init__(self, gradients: object) -> None:
        self._gradients = gradients

    def __getattr__(self, name: str) -> object:
        return getattr(self._gradients, name)

    def __call__(self, batches: list[dict[str, Tensor]], **options: object) -> object:
        found = self._gradients(batches, **options)  # type: ignore[operator]
        next(iter(found[0].values())).item()
        return found


def test_small_steps_no_longer_wait_for_launches() -> None:
    cfg = replace(CONFIG, num_layers=12)
    ms = {}
    for graphs in (False, True):
        step, state = made(cfg, Layout(), graphs=graphs, compiled=True, narrow=True)
        one = on_gpu(0)
        for _ in range(5):
            state, _ = step(state, [one], ahead=True)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
        marks[0].record()
        for mark in marks[1:]:
            state, _ = step(state, [one], ahead=True)
            mark.record()
        torch.cuda.synchronize()
        ms[graphs] = statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))
    print(f"{ms[False]:.2f} ms launched, {ms[True]:.2f} ms recorded")  # noqa: T201
    assert ms[True] < 0.7 * ms[False]
