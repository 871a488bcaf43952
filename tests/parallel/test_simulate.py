"""The simulator itself: it must see copies that differ, and give back whole values."""

import pytest
import torch
from torch import Tensor

from megatree.functional.annotate import as_partial, shard
from megatree.functional.param import Array, Param
from megatree.parallel.assemble import assemble, points
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.rulecheck import spread
from megatree.parallel.simulate import simulate
from megatree.parallel.threads import SimulationError, ThreadComm, Threads
from megatree.parallel.types import make_type
from tests.parallel.worlds import all_types, assert_like_one_device

SIZES = {"a": 2, "b": 3}
WHOLE = torch.arange(144.0, dtype=torch.float64).view(12, 12)


def test_spread_and_assemble_are_inverse_for_every_type() -> None:
    """And copies on I and R axes are equal: terms of a pending sum once differed there."""
    draw = torch.Generator().manual_seed(0)
    for ty in all_types(SIZES, (12, 12)):
        pieces = spread(WHOLE, ty, SIZES, draw)
        again = assemble(pieces, ty, SIZES, "x", rtol=1e-12)
        torch.testing.assert_close(again, WHOLE, rtol=1e-12, atol=1e-12)


def test_copies_that_differ_are_seen() -> None:
    ty = make_type((12, 12), torch.float64, ((), ()), SIZES)
    pieces = [WHOLE.clone() for _ in points(SIZES)]
    pieces[4][3, 3] += 1e-6
    with pytest.raises(
        SimulationError,
        match=r"x: float64\[12, 12\] should be the same over \['a', 'b'\], but the copy at \(1, "
        r"1\) "
        r"differs from the first by 1e-06 of 992\.",
    ):
        assemble(pieces, ty, SIZES, "x", rtol=1e-12)
    pieces[4][3, 3] = torch.nan
    with pytest.raises(SimulationError, match=r"differs from the first by nan"):
        assemble(pieces, ty, SIZES, "x", rtol=1e-12)


def test_pieces_of_another_shape_are_seen() -> None:
    ty = make_type((12, 12), torch.float64, (("a",), ()), SIZES)
    with pytest.raises(
        SimulationError,
        match=r"x: rank 0 holds \[12, 12\], type float64\[12/a, 12\] says \[6, 12\]\.",
    ):
        assemble([WHOLE] * 6, ty, SIZES, "x", rtol=1e-12)


def test_a_result_that_differs_by_rank_seeds_one_gradient() -> None:
    """Section 7: an R result, seeded on every rank, gives n times the gradient."""

    def pending(x: Tensor, w: Tensor) -> Tensor:
        return w.square() * x.sum(0)

    def replicated(x: Tensor, w: Tensor) -> Tensor:
        y = shard(x, "rows embed")  # gathered, and R: its other use differs by rank
        return y * w

    layout = Layout(Mesh(dp=4), Rules(batch="dp"))
    for function in (pending, replicated):
        assert_like_one_device(
            function,
            layout,
            (torch.randn(8, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)),
            ("batch embed", "embed"),
        )


def test_as_partial_keeps_the_value_once() -> None:
    """A bias added to a pending sum counts once, not once per rank."""

    def fn(h: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return shard(h @ w + as_partial(bias, "ffn"), "batch embed")

    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(s, dtype=torch.float64, generator=draw) for s in ((4, 8), (8, 6), (4, 6))]
    ran = assert_like_one_device(
        fn,
        Layout(Mesh(tp=4), Rules(ffn="tp")),
        values,
        ("batch ffn", "ffn embed", "batch embed"),
    )
    assert ran.program.counts("forward") == {"psum": 1}


def test_leaves_and_inputs_get_whole_gradients() -> None:
    """A Param's sum is hoisted out of the program, an input's is not; the result is the same."""
    x = torch.randn(8, 4, dtype=torch.float64)
    w = torch.randn(4, 4, dtype=torch.float64)
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    for declared, phase in (
        (Param("embed width"), "sync"),
        (Array("embed width", grad=True), "backward"),
    ):
        ran = simulate(lambda x, w: (x @ w).tanh(), layout, x, w, axes=("batch embed", declared))
        assert ran.program.counts(phase) == {"psum": 1}
        leaf = w.clone().requires_grad_()
        (x @ leaf).tanh().sum().backward()
        torch.testing.assert_close(ran.grads[1], leaf.grad, rtol=1e-12, atol=1e-12)


def test_a_sibling_that_is_summed_anyway_takes_others_along() -> None:
    """Keys that no axis cuts, beside queries that one cuts: their gradients share one sum."""

    def fn(x: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        y = x.tanh()
        return (y @ wq) * (y @ wk).sum(-1, keepdim=True)

    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(s, dtype=torch.float64, generator=draw) for s in ((4, 6), (6, 8), (6, 2))]
    layout = Layout(Mesh(tp=2), Rules(heads="tp"))
    axes = ("batch embed", Param("embed heads"), Param("embed keys"))
    ran = assert_like_one_device(fn, layout, values, axes)
    assert ran.program.counts("backward") == {"psum": 1}
    assert ran.program.sync == {"wq": (), "wk": ("tp",)}


# -- ranks as threads ---------------------------------------------------------------------------


def test_messages_arrive_in_order_and_a_wrong_shape_is_named() -> None:
    def rank_main(comm: ThreadComm) -> list[float]:
        if comm.coords["a"] == 0:
            for value in (1.0, 2.0):
                comm.send_async(torch.full((2,), value), "a", 1)()
            return []
        waits = [comm.recv_async((2,), torch.float32, "a", 0) for _ in range(2)]
        return [wait()[0].item() for wait in waits]

    assert Threads({"a": 2}).run(rank_main)[1] == [1.0, 2.0]


def test_ranks_that_wait_for_each_other_are_named() -> None:
    def rank_main(comm: ThreadComm) -> Tensor:
        axes = [("a",), ("b",)] if sum(comm.coords.values()) % 2 else [("b",), ("a",)]
        x = torch.ones(2)
        for over in axes:
            x = comm.psum(x, over)
        return x

    with pytest.raises(
        SimulationError, match=r"deadlock: rank 0 waits in psum\(b\), call 1; rank 1"
    ):
        Threads({"a": 2, "b": 2}).run(rank_main)


def test_a_sender_may_overwrite_what_it_sent() -> None:
    def rank_main(comm: ThreadComm) -> Tensor:
        x = torch.full((4,), float(comm.rank))
        out = comm.all_gather(x, ("a",), 0)
        x.fill_(-1.0)
        return out

    for out in Threads({"a": 3}).run(rank_main):
        assert out.view(3, 4)[:, 0].tolist() == [0.0, 1.0, 2.0]
