"""Attention over a cut sequence: every lowering is one device's, in values and all gradients."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.attention_blocks import Added, Merged
from megatree.functional.local_map import local_map
from megatree.functional.param import Array
from megatree.parallel.comm import BodyComm
from megatree.parallel.context import AllGather, Hierarchical, Ring, Ulysses
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh
from megatree.parallel.order import Zigzag, causal_work
from megatree.parallel.simulate import simulate
from megatree.parallel.threads import SimulationError, ThreadComm
from tests.functional.check import rand
from tests.parallel.worlds import assert_like_one_device
from tests.tolerances import RELATIVE, distance

SEQ, BATCH, WIDTH = 16, 2, 4
LOWERINGS: dict[str, Any] = {
    "all-gather": AllGather(),
    "ring": Ring(),
    "all-to-all": Ulysses(),
    "hierarchical": Hierarchical(),
    "hierarchical, gathered": Hierarchical(outer=AllGather()),
}
HEADS = {"mha": (8, 1), "gqa": (2, 8), "mqa": (1, 8)}
AXES = (
    "batch seq kv_heads group head_dim",
    "batch seq kv_heads head_dim",
    "batch seq kv_heads value_dim",
)
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 5 + [4] * 8, [0] * 5 + [3] * 11])
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "both sides": {"causal": False, "window": 3},
    "packed": {"segment_ids": DOCUMENTS},
    "packed window": {"segment_ids": DOCUMENTS, "window": 4},
    "packed full": {"segment_ids": DOCUMENTS[0], "causal": False},
    # positions that are data: the second half of every row comes before the first
    "positions": {"positions": torch.arange(SEQ).roll(SEQ // 2)},
    "sinks": {"sinks": True},
}


def layout(cp: int, how: str, *, zigzag: bool = False, **more: int) -> Layout:
    mesh = Mesh(**more, cp=cp)
    mesh = mesh.refine(fast=2) if how.startswith("hier") and cp > 2 else mesh
    rules = Rules(seq="cp", batch="dp", lower={"attention": LOWERINGS[how]})
    return Layout(mesh, rules, order=Zigzag() if zigzag else None)


def operands(heads: str, value_dim: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    g, r = HEADS[heads]
    return (
        rand(BATCH, SEQ, g, r, WIDTH),
        rand(BATCH, SEQ, g, WIDTH, seed=1),
        rand(BATCH, SEQ, g, value_dim, seed=2),
    )


def check(
    where: Layout, heads: str, mask: str, *, value_dim: int = WIDTH, kernel: str = "auto"
) -> Any:
    """Compare with one device: the result, and the gradients of q, k, v and sinks."""
    names, extra, axes = [], [], []
    options = dict(MASKS[mask], kernel=kernel)
    for name in ("positions", "segment_ids", "sinks"):
        if (x := options.pop(name, None)) is not None:
            names.append(name)
            extra.append(rand(*HEADS[heads], seed=5) if name == "sinks" else x)
            rows = "seq" if extra[-1].dim() == 1 else "batch seq"
            axes.append("kv_heads group" if name == "sinks" else rows)

    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.attention(q, k, v, **dict(zip(names, more, strict=True)), **options)

    values = (*operands(heads, value_dim), *extra)
    return assert_like_one_device(attend, where, values, (*AXES, *axes))


def rows() -> list[Any]:
    """Return every row of the product; a sharp part of it is in the default run."""
    out = []
    for cp, how, heads, mask, zigzag in itertools.product(
        (2, 4, 8), LOWERINGS, HEADS, MASKS, (False, True)
    ):
        if cp == 2 and how.startswith("hier"):
            continue
        if zigzag and SEQ % (2 * cp):
            continue
        number = len(out)
        # each pair (lowering, mask) with some heads and some cp, both orders over the run
        sharp = (number + number // 7) % 8 == 0
        marks = [] if sharp else [pytest.mark.full]
        out.append(pytest.param(cp, how, heads, mask, zigzag, marks=marks))
    return out


@pytest.mark.parametrize(("cp", "how", "heads", "mask", "zigzag"), rows())
def test_a_lowering_is_one_device(cp: int, how: str, heads: str, mask: str, zigzag: bool) -> None:
    check(layout(cp, how, zigzag=zigzag), heads, mask)


@pytest.mark.parametrize("how", ["all-gather", "ring"])
@pytest.mark.parametrize("zigzag", [False, True])
def test_the_reference_kernel_and_values_of_another_width(how: str, zigzag: bool) -> None:
    check(layout(4, how, zigzag=zigzag), "gqa", "causal", value_dim=6)
    check(layout(4, how, zigzag=zigzag), "mha", "packed window", kernel="reference")


def test_heads_may_be_cut_beside_the_sequence() -> None:
    """Under tp each rank has some key heads: an all-to-all cuts those further."""
    for how in ("ring", "all-gather", "all-to-all"):
        rules = Rules(seq="cp", kv_heads="tp", lower={"attention": LOWERINGS[how]})
        check(Layout(Mesh(cp=2, tp=2), rules, order=Zigzag()), "mha", "sinks")
        rules = Rules(seq="cp", group="tp", lower={"attention": LOWERINGS[how]})
        check(Layout(Mesh(cp=2, tp=2), rules), "gqa", "packed")


def test_an_all_gather_is_what_happens_without_a_rule() -> None:
    ran = check(Layout(Mesh(cp=4), Rules(seq="cp")), "gqa", "causal")
    assert ran.program.counts("forward") == {"all_gather": 1}
    assert ran.program.counts("backward") == {"all_gather": 1, "psum_scatter": 1}


def test_queries_alone_may_be_cut() -> None:
    """Keys and values that the user gathered: nothing travels."""
    q, k, v = operands("gqa")
    axes = (AXES[0], "batch s kv_heads head_dim", "batch s kv_heads value_dim")
    for options in ({}, {"window": 5}):
        ran = assert_like_one_device(
            lambda q, k, v, o=options: F.attention(q, k, v, **o),
            layout(4, "ring", zigzag=True),
            (q, k, v),
            axes,
        )
        assert ran.program.counts("forward") == {}
    places = torch.arange(SEQ).roll(3)
    assert_like_one_device(
        lambda q, k, v, p: F.attention(q, k, v, p), layout(4, "ring"), (q, k, v, places),
        (*axes, "seq"),
    )  # fmt: skip


# -- what travels -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "packed"])
def test_no_message_of_a_ring_is_skipped(mask: str) -> None:
    """Rank 0 sees its own piece alone under a causal mask, and still hands on all others."""
    ran = check(layout(4, "ring"), "gqa", mask)
    ints = {"all_gather": 1} if mask == "packed" else {}
    assert ran.program.counts("forward") == {"ppermute": 3, **ints}
    assert ran.program.counts("backward") == {"ppermute": 6}


@pytest.mark.parametrize("how", ["ring", "all-gather"])
@pytest.mark.parametrize(("window", "messages", "tokens"), [(3, 1, 2), (5, 1, 4), (6, 2, 5)])
def test_a_window_sends_what_it_reaches(how: str, window: int, messages: int, tokens: int) -> None:
    """Pieces of 4 tokens: a window of 6 reaches 5 tokens back, over two ranks."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.attention(q, k, v, window=window)

    ran = assert_like_one_device(attend, layout(4, how), operands("gqa"), AXES)
    calls = [c for c in ran.program.collectives if c.phase == "forward"]
    assert [c.kind for c in calls] == ["ppermute"] * messages
    assert sum(c.bytes for c in calls) == BATCH * tokens * 2 * 2 * WIDTH * 8
    assert ran.program.counts("backward") == {"ppermute": 2 * messages}


def test_keys_and_values_travel_with_as_many_heads_as_they_have() -> None:
    sent = {}
    for heads in ("mha", "mqa"):
        ran = check(layout(2, "ring"), heads, "causal")
        sent[heads] = sum(c.bytes for c in ran.program.collectives)
    assert sent["mha"] == 8 * sent["mqa"]


# -- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_zigzag_gives_every_rank_the_same_work(cp: int) -> None:
    """To within one chunk's own triangle; in natural order the last rank has nearly twice."""
    size = 128
    chunk = size // (2 * cp)
    zigzag, natural = (causal_work(size, chunks, cp) for chunks in (2 * cp, 1))
    assert max(zigzag) - min(zigzag) <= chunk
    assert sum(zigzag) == sum(natural) == size * (size + 1) // 2
    assert max(natural) > 1.4 * max(zigzag)


def test_a_value_goes_into_zigzag_order_and_back() -> None:
    where = Layout(Mesh(cp=2, tp=2), Rules(seq="cp", seq_res=("cp", "tp")), order=Zigzag())

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = shard(x.sin(), "seq_res embed") * shard(w.exp(), "seq_res embed")
        places = shard(torch.arange(16), "seq")
        return y, shard(y, "whole_seq embed").cumsum(0), x * places[:, None]

    ran = assert_like_one_device(fn, where, (rand(16, 4), rand(16, 4)), ("seq embed", "_ embed"))
    types = [str(ty) for ty in ran.program.out_types]
    assert types == ["float64[16~/cp.tp, 4]", "float64[16, 4]", "float64[16~/cp, 4]"]


def test_dropout_draws_the_same_bits_in_any_order() -> None:
    key = torch.tensor(3)

    def fn(x: Tensor, q: Tensor, k: Tensor, v: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(x, key, rate=0.4), F.attention(q, k, v, key=key, dropout=0.3)

    values = (rand(BATCH, SEQ, 4), *operands("mha"), key)
    for how in ("all-gather", "all-to-all"):
        assert_like_one_device(
            fn, layout(4, how, zigzag=True), values, ("batch seq embed", *AXES, "")
        )


ZIGZAG = Layout(Mesh(cp=2), Rules(seq="cp"), order=Zigzag())
HERE = r"parallel/test_context\.py:\d+: "
UNORDERED: list[tuple[Callable[..., Any], str]] = [
    (
        lambda x: x * torch.arange(16.0, dtype=torch.float64)[:, None],
        r"mul: dim '0' is cut over \('cp',\)|natural order",
    ),
    (
        local_map(lambda comm, x: x * 2, in_axes=("seq embed",), out_axes="seq embed"),
        HERE + r"local_map <lambda>: operand 0 .* has axis 'seq' in zigzag order, and the body may "
        r"look at its neighbours\. Promise local_map\(\.\.\., any_order=True\), or",
    ),
]


@pytest.mark.parametrize(("fn", "error"), UNORDERED)
def test_what_needs_the_order_refuses_a_permuted_sequence(
    fn: Callable[..., Any], error: str
) -> None:
    with pytest.raises(ShardingError, match=error):
        simulate(fn, ZIGZAG, rand(16, 4), axes=("seq embed",))


def test_an_op_over_a_whole_dim_asks_for_natural_order() -> None:
    """A gathered dim of an axis with an order would be summed up in the wrong order."""
    where = Layout(
        Mesh(cp=2, tp=2), Rules(seq="cp", seq_tp=("cp", "tp")), order=Zigzag(axes=("seq", "seq_tp"))
    )
    ty = Array("seq_tp embed", torch.float64, (16, 4), grad=True)
    with pytest.raises(ShardingError, match=r"cumsum: operand 0 .* is cut on dim 0|zigzag order"):
        lower(lambda x: shard(x, "seq embed").cumsum(0), where, ty)
    half = Layout(Mesh(cp=2), Rules(seq="cp", other="cp"), order=Zigzag(axes=("seq",)))
    one, two = (Array(a, torch.float64, (16, 4)) for a in ("seq embed", "other embed"))
    with pytest.raises(
        ShardingError,
        match=HERE + r"mul: dim '0' is in zigzag order in operand 0 .* and in natural order in "
        r"operand 1",
    ):
        lower(lambda x, y: x * y, half, one, two)
    body = local_map(
        lambda comm, x: x * 2, in_axes=("seq embed",), out_axes="seq embed", any_order=True
    )
    assert_like_one_device(body, ZIGZAG, [rand(16, 4)], ("seq embed",))


# -- bad input ----------------------------------------------------------------------------------


def lowered(where: Layout, heads: tuple[int, int] = (2, 1), seq: int = SEQ, **options: Any) -> Any:
    sizes = {"batch": 2, "seq": seq, "kv_heads": heads[0], "group": heads[1]}
    axes = [a.replace("value_dim", "head_dim") for a in AXES]
    arrays = [Array(a, torch.float32, grad=True) for a in axes]
    return lower(
        lambda q, k, v: F.attention(q, k, v, **options),
        where,
        *arrays,
        sizes={**sizes, "head_dim": 8},
    )


def test_heads_that_do_not_divide_are_named_with_a_fix() -> None:
    with pytest.raises(
        ShardingError,
        match=HERE + r"attention: all-to-all cuts heads over cp \(size 4\), and neither the 6 of "
        r"axis 'kv_heads' on a rank nor the 2 of axis 'group' divide by it\. Make cp 2, or lower "
        r"attention by Ring\(\)\.",
    ):
        lowered(layout(4, "all-to-all"), (6, 2))


def test_a_sequence_that_does_not_divide_is_named_with_a_fix() -> None:
    with pytest.raises(
        ShardingError,
        match=r"q: dim 1 \('seq', size 12\) does not divide into 8 zigzag chunks \(two per rank of "
        r"'cp'\)\. Pad 'seq' to 16, or leave the order natural: Layout\(order=None\)\.",
    ):
        lowered(layout(4, "ring", zigzag=True), seq=12)


@pytest.mark.parametrize("where", [Layout(), layout(4, "ring")], ids=["whole", "cut"])
def test_a_window_beyond_the_sequence_is_refused(where: Layout) -> None:
    with pytest.raises(
        ValueError, match=r"window is 17 tokens, axis 'seq' has 16\. Give at most 16, or None"
    ):
        lowered(where, window=17)


def test_segment_ids_that_fall_are_refused_on_every_rank() -> None:
    ids = DOCUMENTS.clone()
    ids[1, 7] = 0
    error = r"attention: segment ids fall from 3 to 0 at row 1, token 7 of axis 'seq'"
    with pytest.raises(ValueError, match=error):
        F.attention(*operands("mha"), segment_ids=ids)
    for how in ("ring", "all-gather", "all-to-all"):
        with pytest.raises(ValueError, match=r"segment ids fall from 3 to 0 at row 1, token 7"):
            simulate(
                lambda q, k, v, s: F.attention(q, k, v, segment_ids=s),
                layout(2, how),
                *operands("mha"),
                ids,
                axes=(*AXES, "batch seq"),
            )


@pytest.mark.parametrize(
    ("rules", "options", "error"),
    [
        (
            {"lower": {"attention": Ring()}},
            {"dropout": 0.1, "key": 3},
            r"attention: ring has no dropout by key, the rate is 0\.1\. Lower it by AllGather\(\)",
        ),
        (
            {"lower": {"attention": Hierarchical(over="cp")}},
            {},
            r"takes the inner ranks from cp, and the sequence is cut over cp\. Cut it over two",
        ),
    ],
)
def test_what_a_lowering_cannot_do_is_refused(
    rules: dict[str, Any], options: dict[str, Any], error: str
) -> None:
    with pytest.raises(
        ShardingError, match=HERE + "attention: .*" + error.removeprefix("attention: ")
    ):
        lowered(Layout(Mesh(cp=2), Rules(seq="cp", **rules)), **options)


def test_a_lowering_that_is_none_is_refused() -> None:
    with pytest.raises(
        ShardingError, match=r"lower\['attention'\] is 'ring', which lowers nothing"
    ):
        Rules(lower={"attention": "ring"})
    with pytest.raises(ShardingError, match=r"Give inner=Ulysses\(\) and outer=Ring\(\) or"):
        Hierarchical(inner=Ring())
    with pytest.raises(ShardingError, match=r"axis 'seq_res' is cut over tp cp\. Map it to 'cp'"):
        Layout(Mesh(cp=2, tp=2), Rules(seq="cp", seq_res=("tp", "cp")), order=Zigzag())


# -- what is said -------------------------------------------------------------------------------


def test_explain_says_which_kernel_runs_and_why() -> None:
    def note(where: Layout, **options: Any) -> str:
        lines = lowered(where, (2, 2), **options).explain().splitlines()
        at = next(i for i, line in enumerate(lines) if "attention" in line)
        return lines[at + 1].strip()

    assert note(layout(2, "ring")) == (
        "attention by ring over cp: cpu cpu_flash (the fused kernel of a CPU, returns its "
        "log-sum-exp); cuda efficient (takes a mask, and float32)"
    )
    assert "masks from a window" in note(layout(2, "all-gather"), window=3)
    assert note(Layout(), kernel="reference") == "plain torch (asked for)"
    assert note(Layout()) == "torch's fused causal kernels"


# -- the checks can fail ------------------------------------------------------------------------


def _stay(comm: ThreadComm, x: Tensor, axes: Any, split: int, concat: int) -> Tensor:
    return torch.cat(x.chunk(2, split), concat)


def _skip(buffer: Added, at: Any, *part: Any) -> None:
    buffer.claim(at)


@pytest.mark.parametrize(
    ("target", "name", "change", "how", "mask"),
    [
        (Merged, "add", _skip, "ring", "causal"),
        (BodyComm, "ranges", lambda comm, axis, n, j=None: ((0, n),), "ring", "causal"),
        (BodyComm, "ranges", lambda comm, axis, n, j=None: ((0, n),), "all-gather", "window"),
        (BodyComm, "psum_scatter", lambda comm, x, axis, d: x.chunk(2, d)[0], "all-gather", "full"),
        (ThreadComm, "ppermute", lambda comm, x, axes, shift: x, "ring", "full"),
        (ThreadComm, "all_to_all", _stay, "all-to-all", "full"),
    ],
)
def test_a_mutation_is_seen(
    target: Any, name: str, change: Any, how: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, change)
    with pytest.raises((AssertionError, SimulationError)):
        check(layout(2, how), "mha", mask)


def test_a_forgotten_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BodyComm, "ranges", lambda comm, axis, n, j=None: (
        ((comm.axis_index(axis) if j is None else j) * n,
         ((comm.axis_index(axis) if j is None else j) + 1) * n),
    ))  # fmt: skip
    check(layout(2, "ring"), "mha", "causal")
    with pytest.raises(AssertionError):
        check(layout(2, "ring", zigzag=True), "mha", "causal")


def test_the_reference_itself_is_not_what_is_compared() -> None:
    """One device and the ring run different code: a plain loop agrees with both."""
    q, k, v = operands("gqa")
    scores = torch.einsum("btgrk,bsgk->bgrts", q, k) / WIDTH**0.5
    at = torch.arange(SEQ)
    p = scores.masked_fill(at[:, None] < at, -torch.inf).softmax(-1)
    expected = torch.einsum("bgrts,bsgk->btgrk", p, v)
    got = simulate(F.attention, layout(4, "ring", zigzag=True), q, k, v, axes=AXES).value
    assert distance(got, expected) < RELATIVE[torch.float64]
