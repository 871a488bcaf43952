"""`push_up`: sums move through ops to leaves and gathers, and never cost anything."""

import torch

from megatree.functional.annotate import shard
from megatree.functional.param import Array, Param
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh
from megatree.parallel.simulate import simulate

SIZES = {"batch": 4, "seq": 6, "past": 6, "embed": 8, "ffn": 4}
X = Array("batch seq embed", torch.float64, grad=True)


def values(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def check(fn, layout, arrays, axes):
    """Compare with one device, and return the program."""
    ran = simulate(fn, layout, *arrays, axes=axes)
    alone = simulate(fn, Layout(), *arrays, axes=axes)
    torch.testing.assert_close(ran.value, alone.value, rtol=1e-12, atol=1e-12)
    for mine, expected in zip(ran.grads, alone.grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    return ran.program


def test_a_leaf_behind_an_op_is_synchronised_once_per_step() -> None:
    """Without it the backward of every microbatch sums the gradient of tril(w)."""

    def mix(w, x):
        return torch.einsum("ts,bsd->btd", torch.tril(w), x)

    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    program = check(mix, layout, values((6, 6), (4, 6, 8)), (Param("seq past"), "batch past embed"))
    assert program.sync["w"] == ("dp",)
    assert program.counts("backward") == {}


def test_a_sum_merges_with_the_slice_of_a_gather() -> None:
    """Through an op between gather and product: a reduce-scatter instead of slice and
    all-reduce.
    """

    def scaled(g, w, x):
        y = shard(x, "batch seq embed") * g
        return torch.einsum("btd,fd->btf", y, w)

    layout = Layout(Mesh(tp=2), Rules(seq_res="tp", ffn="tp"))
    program = check(
        scaled,
        layout,
        values((8,), (4, 8), (4, 6, 8)),
        (Param("embed"), Param("ffn embed"), "batch seq_res embed"),
    )
    assert program.counts("backward") == {"psum_scatter": 1}
    assert program.sync["g"] == ("tp",)


def test_a_sum_stays_where_moving_it_would_gain_nothing() -> None:
    """Behind an all-reduce or an input there is no slice to merge with: no leaf gets a sync."""

    def after_sum(h, down, g, w):
        y = shard(torch.einsum("btf,fd->btd", h, down), "batch seq embed") * g
        return torch.einsum("btd,fd->btf", y, w)

    program = lower(
        after_sum,
        Layout(Mesh(tp=2), Rules(ffn="tp")),
        Array("batch seq ffn", torch.float64, grad=True),
        Param("ffn embed"),
        Param("embed"),
        Param("ffn embed"),
        sizes=SIZES,
        dtype=torch.float64,
    )
    assert program.sync["g"] == ()
    assert program.counts("backward") == {"psum": 1}
