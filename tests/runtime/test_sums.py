"""Gradients in a step's buffers: the first replaces what was there, later ones are added to it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatree.parallel.layout import Layout, Rules, Storage
from megatree.parallel.mesh import Mesh
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.step import TrainStep
from tests.runtime.tiny_step import BATCH, tiny_data, tiny_step

LAYOUTS = {
    "one rank": Layout(),
    "dp2": Layout(Mesh(dp=2), Rules(batch="dp")),
    "zero-1": Layout(Mesh(dp=2), Rules(batch="dp"), storage=Storage(opt="dp")),
}


def spoil(step: TrainStep) -> None:
    """Leave what no sum may show in every gradient's place."""
    for group in step.groups:
        for row in range(group.num_rows):
            for leaf in group.leaves:
                step.gradients.sums.target((group.name, row), leaf).fill_(torch.nan)


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_of_the_step_before_is_left(name: str, num_microbatches: int) -> None:
    layout = LAYOUTS[name]

    def body(comm: ThreadComm | None) -> None:
        step = tiny_step(layout, comm)
        step.init()
        size = BATCH * num_microbatches
        batches = [step.local(tiny_data().batch(i, BATCH)) for i in range(0, size, BATCH)]
        step.gradients(batches)
        first = {key: x.clone() for key, x in step.gradients.sums.shards().items()}
        spoil(step)
        step.gradients(batches)
        for key, x in step.gradients.sums.shards().items():
            assert torch.equal(x, first[key]), key
            assert x.count_nonzero() > 0

    if layout.mesh.num_ranks == 1:
        body(None)
    else:
        Threads(layout.mesh.sizes).run(body)


def test_a_leaf_that_no_gradient_reaches_is_zero() -> None:
    step = tiny_step(Layout())
    step.init()
    sums = step.gradients.sums
    group = step.groups[0]
    spoil(step)
    sums.begin(1)
    first, *others = group.leaves
    sums.add(
        (group.name, 0), first, torch.ones_like(group.whole(sums.stored[group.name][0], first))
    )
    sums.finish()
    rows = sums.stored[group.name]
    assert (group.whole(rows[0], first) == 1).all()
    assert all(group.whole(rows[0], leaf).count_nonzero() == 0 for leaf in others)
    for other in step.groups[1:]:
        assert sums.stored[other.name].count_nonzero() == 0


class _Written(TorchDispatchMode):
    """Counts elements that are zeroed or added in place."""

    zeroed = added = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zero_.default:
            self.zeroed += args[0].numel()
        if func is torch.ops.aten.add_.Tensor and isinstance(args[1], Tensor):
            self.added += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_one_microbatch_neither_zeroes_nor_adds() -> None:
    step = tiny_step(Layout())
    step.init()
    total = sum(x.numel() for x in step.gradients.sums.stored.values())
    leaves = {
        (group.name, row, leaf.path): torch.ones(leaf.size)
        for group in step.groups
        for row in range(group.num_rows)
        for leaf in group.leaves
    }
    for times, added in ((1, 0), (2, total)):
        with _Written() as seen:
            step.gradients.sums.begin(times)
            for _ in range(times):
                for group in step.groups:
                    for row in range(group.num_rows):
                        for leaf in group.leaves:
                            like = group.whole(step.gradients.sums.stored[group.name][row], leaf)
                            grad = leaves[group.name, row, leaf.path].view(like.shape)
                            step.gradients.sums.add((group.name, row), leaf, grad)
            step.gradients.sums.finish()
        assert seen.zeroed == 0
        assert seen.added == pytest.approx(added, rel=0.1)
