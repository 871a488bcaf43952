"""The executor and the loop that the benchmark compares it with do the same work."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import pipeline
from megatree.parallel.schedule import Schedule, interleaved, one_f_one_b, zero_bubble_h1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "generate", [one_f_one_b, lambda p, m: interleaved(p, m, 2), zero_bubble_h1]
)
def test_both_sides_compute_the_same_gradients(
    generate: Callable[[int, int], Schedule], rank: int
) -> None:
    step = pipeline.one_rank(generate, 2, rank, 2)
    leaves, sums = step[0].executor.leaves, step[0].sums
    found = []
    for run in (pipeline.by_executor(step), pipeline.by_hand(step)):
        leaves.begin(2)
        run()
        found.append({name: buffer.clone() for name, buffer in sums.stored.items()})
    for name, buffer in found[0].items():
        torch.testing.assert_close(found[1][name], buffer)
        assert buffer.abs().max() > 0, name
