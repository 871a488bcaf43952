"""`local_map`: a body on a mesh is the body on one device, forward and gradients, or an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.local_map import Out, local_map
from megatree.functional.param import Array
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh
from megatree.parallel.simulate import simulate
from megatree.parallel.threads import SimulationError
from tests.parallel.worlds import assert_like_one_device

HERE = r"parallel/test_local_map\.py:\d+: "
LAYOUTS = {
    "one axis": Layout(Mesh(cp=2), Rules(seq="cp")),
    "four ranks": Layout(Mesh(cp=4), Rules(seq="cp")),
    "two axes": Layout(Mesh(cp=2, tp=2), Rules(seq=("cp", "tp"))),
    "two axes, swapped": Layout(Mesh(cp=2, tp=2), Rules(seq=("tp", "cp"))),
    "batch too": Layout(Mesh(dp=2, cp=2, tp=2), Rules(batch="dp", seq="cp", heads="tp")),
    "one device": Layout(),
}


def real(*shape: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    )


def every_primitive(comm: Any, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Use all collectives; x is [b, t, d], cut along t."""
    n, rows = comm.axis_size("seq"), x.shape[1]
    place = torch.arange(rows, dtype=x.dtype) + comm.axis_index("seq") * rows
    x = x * (1 + place[:, None]) * w
    # all_to_all: a running sum over the whole sequence, each rank for some of the columns
    columns = comm.all_to_all(x, "seq", 2, 1)
    running = comm.all_to_all(columns.cumsum(1), "seq", 1, 2)
    # all_gather and psum_scatter: every rank adds to every row
    whole = comm.all_gather(x, "seq", 1)
    added = comm.psum_scatter(whole * x.square().sum(1, keepdim=True), "seq", 1)
    # ppermute: a ring that sums all shards
    ring = part = x.sin().sum(1)
    for _ in range(n - 1):
        part = comm.ppermute(part, "seq", 1)
        ring = ring + part
    # pmax and psum: logsumexp over the sequence
    top = comm.pmax(x.amax(1), "seq")
    lse = (x - top[:, None]).exp().sum(1)
    lse = comm.psum(lse, "seq").log() + top
    # all_to_all_v: pieces of other sizes there and back
    flat = x.transpose(0, 1)
    sizes = [rows // n] * n
    sent = comm.all_to_all_v(flat, "seq", sizes, sizes).tanh()
    back = comm.all_to_all_v(sent, "seq", sizes, sizes).transpose(0, 1)
    return running + added + back, ring * lse, (x * w).sum((1, 2))


PRIMITIVES = local_map(
    every_primitive,
    in_axes=("batch seq embed", "embed"),
    out_axes=(
        "batch seq embed",
        Out("batch embed", replicated=("seq",)),
        Out("batch", partial=("seq",)),
    ),
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_body_with_every_primitive_obeys_the_law(name: str) -> None:
    """Sees a wrong dual of one primitive, and a wrong state of one output, value or cotangent."""
    values = (real(2, 16, 8), real(8))
    ran = assert_like_one_device(PRIMITIVES, LAYOUTS[name], values, ("batch seq embed", "embed"))
    forward, backward = (ran.program.counts(phase) for phase in ("forward", "backward"))
    ring = {"one device": 0, "one axis": 1, "batch too": 1}.get(name, 3)
    if ring:
        calls = {
            "all_to_all": 2, "all_gather": 1, "psum_scatter": 1, "ppermute": ring, "pmax": 1,
            "psum": 1, "all_to_all_v": 2,
        }  # fmt: skip
        assert forward == calls
        # pmax has no gradient; w comes in as I and is used differently by the ranks: one more sum
        del calls["pmax"]
        calls["psum"] += 1
        assert backward == calls
        both = {kind: forward.get(kind, 0) + backward.get(kind, 0) for kind in forward | backward}
        assert ran.counts == both


def test_the_flavour_without_r_is_declare_p_then_shard() -> None:
    body = local_map(
        lambda comm, x: x.sum(0), in_axes=("seq embed",), out_axes=Out("embed", partial=("seq",))
    )
    ran = assert_like_one_device(
        lambda x: shard(body(x), "embed").square(),
        LAYOUTS["two axes"],
        [real(8, 4)],
        ("seq embed",),
    )
    assert (ran.program.counts("forward"), ran.program.counts("backward")) == ({"psum": 1}, {})


def test_a_body_may_cut_an_operand_that_all_ranks_share() -> None:
    """The operand was I and its gradient every rank's own: wrong, and all copies differed."""

    def own_rows(comm: Any, x: Tensor) -> Tensor:
        return x.chunk(comm.axis_size("seq"))[comm.axis_index("seq")] * 2

    body = local_map(own_rows, in_axes=("_ embed",), out_axes="seq embed")
    ran = assert_like_one_device(body, LAYOUTS["two axes"], [real(8, 4)], ("_ embed",))
    assert ran.program.counts("backward") == {"psum": 1}


def test_communication_over_an_axis_that_cuts_nothing() -> None:
    def average(comm: Any, x: Tensor) -> Tensor:
        mine = x * (1 + comm.axis_index("seq"))
        n = comm.axis_size("seq")
        return comm.psum(mine, "seq") / (n * (n + 1) / 2)

    body = local_map(
        average, in_axes=("embed",), out_axes=Out("embed", replicated=("seq",)), over=("seq",)
    )
    assert_like_one_device(body, LAYOUTS["four ranks"], [real(4)], ("embed",))


def test_a_body_may_draw_its_output_shape_from_data() -> None:
    """static=False: nothing is tried at lowering, sizes come from names."""

    def keep_positive(comm: Any, x: Tensor) -> Tensor:
        picked = x[x > 0]  # a data-dependent shape inside the body
        return x * picked.detach().new_ones(()) + 0 * picked.sum()

    body = local_map(keep_positive, in_axes=("seq embed",), out_axes="seq embed", static=False)
    layout = LAYOUTS["one axis"]
    assert_like_one_device(body, layout, [real(8, 4)], ("seq embed",))
    unknown = local_map(keep_positive, in_axes=("seq embed",), out_axes="seq found", static=False)
    with pytest.raises(
        ShardingError,
        match=HERE
        + r"local_map keep_positive: output 0 has axes \['found'\] of unknown size\. With "
        r"static=False name output dims by axes of the operands\.",
    ):
        simulate(unknown, layout, real(8, 4), axes=("seq embed",))


def test_metrics_of_a_body_may_have_no_gradient() -> None:
    def body(comm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, comm.psum(x.detach().sum(), "seq")

    both = local_map(
        body,
        in_axes=("seq embed",),
        out_axes=("seq embed", Out("", replicated=("seq",), grad=False)),
    )
    ran = assert_like_one_device(both, LAYOUTS["one axis"], [real(8, 4)], ("seq embed",))
    assert [ty.grad for ty in ran.program.out_types] == [True, False]


# -- wrong declarations -------------------------------------------------------------------------


def total(comm: Any, x: Tensor) -> Tensor:
    return comm.psum(x.sum(0), "seq")


def own_sum(comm: Any, x: Tensor) -> Tensor:
    return x.sum(0)


P_OUT, R_OUT = Out("embed", partial=("seq",)), Out("embed", replicated=("seq",))


@pytest.mark.parametrize(
    ("body", "declared", "text"),
    [
        (total, P_OUT, r"result \(\): off by 1;"),
        (
            own_sum,
            R_OUT,
            r"result 0: float64\[4\] should be the same over \['cp'\], but the copy at",
        ),
    ],
)
def test_a_wrong_declaration_shows_in_the_values(body: Callable, declared: Out, text: str) -> None:
    """R declared P counts n times; P declared R is one rank's part."""
    wrong = local_map(body, in_axes=("seq embed",), out_axes=declared)
    with pytest.raises((SimulationError, AssertionError), match=text):
        assert_like_one_device(wrong, LAYOUTS["one axis"], [real(8, 4)], ("seq embed",))


def test_a_gradient_that_skips_its_sum_shows() -> None:
    """A value that is right on every rank, with a backward that forgets the others."""

    class Lazy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, comm: Any) -> Tensor:
            ctx.rows = x.shape[0]
            return comm.psum(x.sum(0), "seq")

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return g.expand(ctx.rows, -1), None

    wrong = local_map(lambda comm, x: Lazy.apply(x, comm), in_axes=("seq embed",), out_axes=R_OUT)
    with pytest.raises(AssertionError, match=r"1 of 2 leaves: gradient 0 \(\): off by 0\.707"):
        assert_like_one_device(wrong, LAYOUTS["one axis"], [real(8, 4)], ("seq embed",))


def low(body: Callable[..., Any], layout: Layout = LAYOUTS["one axis"], **declared: Any) -> None:
    x = Array("seq embed", torch.float64, grad=True)
    declared = {"in_axes": ("seq embed",), "out_axes": "seq embed", **declared}
    lower(local_map(body, **declared), layout, x, sizes={"seq": 8, "embed": 4})


@pytest.mark.parametrize(
    ("body", "declared", "text"),
    [
        (
            own_sum,
            {"out_axes": "embed"},
            r"local_map own_sum: output 0 \('embed'\) does not say what it is over mesh axis 'cp', "
            r"on "
            r"which an input or another output varies\. Name the logical axis in the output's "
            r"dims, "
            r"in Out\(partial=\.\.\.\) or in Out\(replicated=\.\.\.\)\.",
        ),
        (
            own_sum,
            {},
            r"local_map own_sum: output 0 is declared 'seq embed', the body returns \[4\]\. "
            r"Give one name per dim\.",
        ),
        (
            lambda comm, x: (x, x),
            {},
            r"local_map <lambda>: the body returns 2 values, out_axes declares 1\. "
            r"Declare one per output\.",
        ),
        (
            lambda comm, x: x[:1],
            {},
            r"local_map <lambda>, output 0: axis 'seq' has size 2 here and size 8 at ",
        ),
        (
            lambda comm, x: x.reshape(3, 3),
            {},
            r"local_map <lambda>: the body failed at local shapes \[\[4, 4\]\]: .*Fix the body, or "
            r"declare static=False if its shapes depend on data\.",
        ),
        (
            lambda comm, x: comm.psum(x, "sequence"),
            {},
            r".*comm: 'sequence' is not an axis of this body \(it has embed, seq\)\. Name it in "
            r"in_axes, "
            r"out_axes or over\.",
        ),
        (
            lambda comm, x: x,
            {"in_axes": ("_ embed",)},
            r"local_map <lambda>: operand 0 is float64\[8/cp, 4\], declared '_ embed' = \(\(\), "
            r"\(\)\)\. "
            r"shard\(x, '_ embed'\) it first\.",
        ),
        (
            lambda comm, x: x,
            {"in_axes": ("seq",)},
            r"local_map <lambda>: operand 0 \(float64\[8/cp, 4\]\) is declared 'seq'\. "
            r"Give one name per dim\.",
        ),
        (
            lambda comm, x: shard(x, "seq embed"),
            {},
            r"shard inside a local_map body, where values are local and it would do nothing\. Use "
            r"comm's collectives, or annotate outside the body\.",
        ),
        (
            lambda comm, x: PRIMITIVES(x[None], x[0])[0][0],
            {},
            r"local_map every_primitive inside a local_map body, where it would run as on one "
            r"device\. "
            r"Call its body with this body's comm\.",
        ),
        (
            lambda comm, x: F.dropout(x, 7, rate=0.5),
            {},
            r"dropout inside a local_map body draws its mask by local index: the same mask on "
            r"every "
            r"shard\. Apply dropout outside the body\.",
        ),
    ],
)
def test_a_wrong_body_is_refused(body: Callable, declared: dict[str, Any], text: str) -> None:
    with pytest.raises(ShardingError, match=HERE + text):
        low(body, **declared)


def test_ops_without_dropout_are_welcome_in_a_body() -> None:
    low(lambda comm, x: F.dropout(F.rms_norm(x), 7, rate=0.0))


def lower_on_seq(fn: Callable[[Tensor], Tensor]) -> None:
    lower(
        fn, LAYOUTS["one axis"], Array("seq embed", grad=True), sizes={"seq": 8, "embed": 4}
    )  # fmt: skip


def test_a_body_that_closes_over_a_typed_tensor_is_refused() -> None:
    def fn(x: Tensor) -> Tensor:
        return local_map(lambda comm, y: y + x, in_axes=("seq embed",), out_axes="seq embed")(x)

    with pytest.raises(
        ShardingError, match=r"a typed tensor is used outside the trace it belongs to"
    ):
        lower_on_seq(fn)


def test_a_pending_sum_does_not_enter_a_body() -> None:
    body = local_map(lambda comm, y: y * y, in_axes=("embed",), out_axes=R_OUT)
    with pytest.raises(
        ShardingError,
        match=r"local_map <lambda>: operand 0 \(float32\[4\] P\(cp\)\) is a pending sum over mesh "
        r"axis "
        r"'cp'\. Insert shard\(x, \.\.\.\) before the body\.",
    ):
        lower_on_seq(lambda x: body(x.sum(0)))


def test_a_plain_operand_is_refused() -> None:
    body = local_map(lambda comm, x, y: x + y, in_axes=("seq embed", "embed"), out_axes="seq embed")
    with pytest.raises(ShardingError, match=r"mixes a plain tensor \[4\] with a typed one"):
        lower_on_seq(lambda x: body(x, PLAIN))


def test_the_number_of_operands_is_checked_everywhere() -> None:
    with pytest.raises(
        ValueError,
        match=r"local_map total: 2 operands given, in_axes declares 1\. "
        r"Declare one string of axes per operand\.",
    ):
        local_map(total, in_axes=("seq embed",), out_axes=R_OUT)(PLAIN, PLAIN)


# -- ranks that disagree ------------------------------------------------------------------------


class SumOnFirst(torch.autograd.Function):
    """A backward that communicates on the first rank only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Any) -> Tensor:
        ctx.comm = comm
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return (ctx.comm.psum(g, "seq") if ctx.comm.axis_index("seq") == 0 else g), None


def other_kind(comm: Any, x: Tensor) -> Tensor:
    return comm.psum(x, "seq") if comm.axis_index("seq") else comm.ppermute(x, "seq", 1)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            lambda comm, x: SumOnFirst.apply(x, comm),
            r"deadlock: rank 0 waits in psum\(cp\), call 1; ranks \[1\] have finished\.",
        ),
        (
            lambda comm, x: x if comm.axis_index("seq") else comm.psum(x, "seq"),
            r"deadlock: rank 0 waits in psum\(cp\), call 1; ranks \[1\] have finished\.",
        ),
        (
            other_kind,
            r"mismatched collectives in group \[0, 1\], call 1: rank 0: ppermute\(cp\)\(\(4, 4\), "
            r"1\), "
            r"rank 1: psum\(cp\)\(4, 4\)\.",
        ),
        (
            lambda comm, x: comm.all_to_all_v(
                x, "seq", [1, 3] if comm.axis_index("seq") else [2, 2], [2, 2]
            ),
            r"all_to_all_v\(cp\): rank \d expects \[2, 2\] rows, its peers send \[.*\]\.",
        ),
    ],
)
def test_ranks_that_disagree_are_named(body: Callable, text: str) -> None:
    """A collective skipped in one rank's backward hangs a real run."""
    wrong = local_map(body, in_axes=("seq embed",), out_axes="seq embed")
    with pytest.raises(SimulationError, match=text):
        simulate(wrong, LAYOUTS["one axis"], real(8, 4), axes=("seq embed",))


def test_an_error_in_a_body_says_on_which_rank() -> None:
    def breaks(comm: Any, x: Tensor) -> Tensor:
        if comm.axis_index("seq") == 1:
            raise KeyError("the bug itself")
        return comm.psum(x, "seq")

    body = local_map(breaks, in_axes=("seq embed",), out_axes="seq embed", static=False)
    with pytest.raises(KeyError, match="the bug itself") as caught:
        simulate(body, LAYOUTS["one axis"], real(8, 4), axes=("seq embed",))
    assert caught.value.__notes__ == ["on simulated rank 1 of 2"]


PLAIN = torch.ones(4)
