"""The planner: every type to every type, values and cotangents, on simulated ranks."""

import pytest
import torch

from megatree.parallel.comm import move
from megatree.parallel.threads import Threads
from megatree.parallel.transitions import COLLECTIVES, plan_move
from tests.parallel.worlds import all_types, collect, relative, spread

SIZES = {"a": 2, "b": 3}


@pytest.mark.parametrize("state", ["forward"])
def test_every_move_is_the_identity_and_its_dual_too(state: str) -> None:
    """All 27 x 27 pairs on a 2 x 3 mesh: a wrong step, order or dual shows in value or cotangent."""
    generator = torch.Generator().manual_seed(0)
    types = all_types(SIZES, 2, size=12)
    assert len(types) == 27
    for src in types:
        for dst in types:
            value, cotangent = torch.randn(2, 12, 12, dtype=torch.float64, generator=generator)
            xs = spread(value, src, SIZES, generator)
            gs = spread(cotangent, dst.dual, SIZES, generator)

            def rank_main(comm, xs=xs, gs=gs, src=src, dst=dst):
                x = xs[comm.rank].requires_grad_()
                y = move(comm, x, src, dst)
                y.backward(gs[comm.rank])
                return y.detach(), x.grad

            results = Threads(SIZES).run(rank_main)
            assert relative(collect([y for y, _ in results], dst, SIZES), value) < 1e-12, (src, dst)
            grad = collect([g for _, g in results], src.dual, SIZES)
            assert relative(grad, cotangent) < 1e-12, (src, dst)


def test_a_move_takes_at_most_two_collectives() -> None:
    types = all_types(SIZES, 2, size=12)
    counts = [sum(s.kind in COLLECTIVES for s in plan_move(a, b)) for a in types for b in types]
    assert max(counts) == 2
