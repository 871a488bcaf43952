"""Meshes as values: the order of axes, ranks, and refinement into atomic axes."""

import itertools
import math

import pytest

from megatree.parallel.errors import ShardingError
from megatree.parallel.mesh import Mesh


def test_standard_axes_are_ordered_and_others_stay_where_they_are() -> None:
    assert [n for n, _ in Mesh(tp=2, dp=2, pp=2).atoms] == ["pp", "dp", "tp"]
    assert [n for n, _ in Mesh(tp=2, rows=3, dp=2).atoms] == ["dp", "rows", "tp"]


def test_axes_of_size_one_are_dropped() -> None:
    mesh = Mesh(dp=1, tp=2)
    assert (mesh.sizes, mesh.axes("dp"), mesh.axes("cp"), mesh.num_ranks) == (
        {"tp": 2}, (), (), 2,
    )  # fmt: skip
    assert str(Mesh()) == "one device"


def test_ranks_count_row_major_with_tp_innermost() -> None:
    mesh = Mesh(tp=3, dp=2)
    grid = [mesh.coords(rank) for rank in range(6)]
    assert [(at["dp"], at["tp"]) for at in grid] == list(itertools.product(range(2), range(3)))
    assert mesh.ranks(("tp",), mesh.coords(4)) == [3, 4, 5]
    assert mesh.ranks(("dp",), mesh.coords(4)) == [1, 4]


def test_a_group_is_in_the_order_of_its_tuple() -> None:
    """A group in mesh order for a spec in another order exchanges chunks of the wrong ranks."""
    mesh = Mesh(dp=2, tp=3)
    at = mesh.coords(0)
    assert mesh.ranks(("dp", "tp"), at) == [0, 1, 2, 3, 4, 5]
    assert mesh.ranks(("tp", "dp"), at) == [0, 3, 1, 4, 2, 5]


def test_kv_heads_fewer_than_tp_take_a_part_of_tp() -> None:
    mesh = Mesh(dp=2, tp=4).refine(kv=2)
    assert mesh.sizes == {"dp": 2, "tp": 2, "tp.2": 2}
    assert mesh.axes("tp") == ("tp", "tp.2")
    assert mesh.axes("kv") == ("tp.2",)
    assert mesh.axes("tp/kv") == ("tp",)
    assert mesh.num_ranks == 8


def test_experts_fold_over_all_of_tp_and_a_part_of_dp() -> None:
    mesh = Mesh(pp=2, dp=8, tp=8).refine(ep=16, kv=2)
    assert mesh.sizes == {"pp": 2, "dp": 4, "dp.2": 2, "tp": 4, "tp.2": 2}
    assert mesh.axes("ep") == ("dp.2", "tp", "tp.2")
    assert mesh.axes("kv") == ("tp.2",)
    assert mesh.axes("dp/ep") == ("dp",)
    assert mesh.axes("ep/tp") == ("dp.2",)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(tp=8).refine(kv=2, ep=4),
        Mesh(tp=8).refine(ep=4).refine(kv=2),
        Mesh(dp=4, tp=16).refine(a=2, b=4, c=8, d=32),
        Mesh(dp=12, tp=2).refine(a=4).refine(b=8),
    ],
)
def test_a_split_of_a_split_keeps_all_ranks(mesh: Mesh) -> None:
    """Two parts of one axis once had one name, and half of the ranks were lost."""
    whole = math.prod(size for _, size in mesh.atoms)
    assert math.prod(mesh.sizes.values()) == whole == mesh.num_ranks
    coords = [tuple(mesh.coords(rank).items()) for rank in range(whole)]
    assert len(set(coords)) == whole
    for name, _ in mesh.names:
        if name not in ("dp", "tp"):
            inner = mesh.ranks(mesh.axes(name), mesh.coords(0))
            assert inner == list(range(len(inner))), f"{name} is not the innermost block"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mesh(dp=0), r"Mesh: axis 'dp' has size 0\. Give at least 1\."),
        (
            lambda: Mesh(dp=2, tp=2).axes("model"),
            r"mesh axis 'model': the mesh has dp, tp \(and pp, dp, ep, cp, tp of size 1 where "
            r"absent\)\. Add it to the Mesh or rename it in Rules\.",
        ),
        (
            lambda: Mesh(dp=2, tp=4).refine(kv=3),
            r"refine\(kv=3\): no block of 3 inner ranks divides the axes \{'dp': 2, 'tp': 4\} "
            r"\(pp excluded\)\. Choose a size that divides them\.",
        ),
        (
            lambda: Mesh(pp=2, tp=2).refine(ep=4),
            r"refine\(ep=4\): no block of 4 inner ranks",
        ),
        (
            lambda: Mesh(dp=2, tp=4).refine(tp=2),
            r"refine\(tp=2\): the mesh has an axis 'tp' already\. Give the part a name of its "
            r"own\.",
        ),
    ],
)
def test_a_wrong_mesh_says_what_to_do(make, text: str) -> None:
    with pytest.raises((ValueError, ShardingError), match=text):
        make()
