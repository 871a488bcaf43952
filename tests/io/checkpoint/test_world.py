"""The processes as a value."""

import re

import pytest

from megatree.io.world import World


def test_a_rank_outside_the_world_is_refused():
    text = "World: rank 2 is not in a world of 2 ranks. Give a rank from 0 to 1."
    with pytest.raises(ValueError, match=re.escape(text)):
        World(rank=2, size=2, barrier=lambda: None, gather=lambda v: [v], broadcast=lambda v: v)


def test_single_meets_itself():
    world = World.single()
    world.barrier()
    assert (world.gather(3), world.broadcast("x"), world.agree(lambda: 7)) == ([3], "x", 7)


@pytest.mark.parametrize(("kind", "elsewhere"), [(OSError, OSError), (KeyError, ValueError)])
def test_agree_raises_on_every_rank_when_one_fails(run_ranks, kind, elsewhere):
    """Only here: ranks that did not fail would wait for ever at the next meeting."""

    def fail_on_1(world):
        def work():
            if world.rank == 1:
                raise kind("no room")
            return world.rank

        return world.agree(work)

    outcomes = run_ranks(3, fail_on_1)
    assert [type(outcome) for outcome in outcomes] == [elsewhere, kind, elsewhere]
    assert str(outcomes[0]) == f"rank 1: {kind('no room')}"
    assert run_ranks(3, lambda world: world.agree(lambda: world.rank)) == [0, 1, 2]


def test_on_first_runs_on_rank_0_alone(run_ranks):
    assert run_ranks(3, lambda world: world.on_first(lambda: world.rank + 5)) == [5, None, None]
