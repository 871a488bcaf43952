"""Types as values: states, duals, local shapes and how they print."""

import itertools

import pytest
import torch

from megatree.parallel.transitions import only_widens
from megatree.parallel.types import I, P, R, S, ShardType, make_type
from tests.parallel.worlds import all_types, type_of

SIZES = {"dp": 2, "tp": 4}


def typed(kinds: dict[str, str] | None = None, *, grad: bool = True) -> ShardType:
    return make_type((8, 6), torch.bfloat16, (("dp",), ()), SIZES, kinds=kinds, grad=grad)


def test_every_axis_has_one_state_and_i_is_the_default() -> None:
    ty = typed()
    assert [ty.state(axis) for axis in SIZES] == [S, I]
    assert ty.kinds == (("tp", I),)
    assert typed({"tp": P}).axes_in(P) == ("tp",)


@pytest.mark.parametrize(("state", "dual"), [(I, I), (R, P), (P, R)])
def test_the_dual_of_a_state(state: str, dual: str) -> None:
    ty = typed({"tp": state})
    assert ty.dual.state("tp") == dual
    assert ty.dual.spec == ty.spec


def test_the_dual_of_the_dual_is_the_type_itself() -> None:
    types = all_types({"a": 2, "b": 3}, (12, 12))
    assert [ty.dual.dual for ty in types] == types
    assert len({ty.dual for ty in types}) == len(types)


def test_a_value_without_gradient_is_never_r() -> None:
    assert typed({"tp": R}, grad=False).state("tp") == I
    assert typed({"tp": P}, grad=False).state("tp") == P


def test_a_type_prints_on_one_line() -> None:
    both = make_type((8, 6), torch.float32, (("dp", "tp"), ()), SIZES)
    assert str(both) == "float32[8/dp.tp, 6]"
    assert str(typed({"tp": P})) == "bfloat16[8/dp, 6] P(tp)"
    assert str(typed()) == "bfloat16[8/dp, 6]"


def test_local_shapes() -> None:
    assert typed().local_shape(SIZES) == (4, 6)
    both = make_type((8, 6), torch.float32, (("dp", "tp"), ()), SIZES)
    assert both.local_shape(SIZES) == (1, 6)


def test_only_i_to_r_counts_as_widening() -> None:
    """`widen` merges exactly these: one more pair and a sum is lost, one less and it runs twice."""
    sizes = {"a": 2, "b": 2}
    found = {}
    for src, dst in itertools.product([0, I, R, P], repeat=2):
        pair = [type_of({"a": state, "b": I}, "ab", sizes, (4,)) for state in (src, dst)]
        found[src, dst] = only_widens(*pair)
    widens = {pair: axes for pair, axes in found.items() if axes}
    assert widens == {(I, R): frozenset("a")}
    same = [pair for pair, axes in found.items() if axes == frozenset()]
    assert same == [(s, s) for s in (0, I, R, P)]
