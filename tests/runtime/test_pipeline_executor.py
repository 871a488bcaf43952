"""How the executor runs: messages under compute, memory given back at once, compiled bodies."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Array, Param
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import PIPELINE, Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.schedule import (
    Schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.ranks import ranks
from tests.tolerances import assert_leaves_close

CFG = GPTConfig(vocab_size=16, seq_length=4, num_layers=4, embed=8, kv_heads=2, head_dim=4, ffn=8)


def batch() -> dict[str, Tensor]:
    tokens = torch.arange(2 * 4).reshape(2, 4)
    return {"tokens": tokens, "labels": tokens, "weights": torch.ones(2, 4)}


def one_step(layout: Layout, comm: Any, m: int, transform: Any = lambda fn: fn) -> Any:
    step = train_step(gpt(CFG, batch_size=2), layout, adamw(1e-3), comm=comm, transform=transform)
    return step(step.init(0), [step.local(batch())] * m)[1]


def test_receives_are_posted_while_the_rank_still_computes() -> None:
    """1F1B: but for the first forward, a message is asked for at least one action before its use.

    A rank that posted a receive only when it must read would leave the wire idle under compute.
    """

    def events(comm: ThreadComm) -> list[str]:
        seen: list[str] = []
        send, recv = comm.send_async, comm.recv_async

        def send_async(x: Tensor, axis: str, to: int) -> Callable[[], None]:
            seen.append("send")
            return send(x, axis, to)

        def recv_async(*args: Any) -> Callable[[], Tensor]:
            seen.append("post")
            wait = recv(*args)

            def waited() -> Tensor:
                seen.append("take")
                return wait()

            return waited

        def noted(fn: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                seen.append("compute")
                return fn(*args)

            return call

        comm.send_async, comm.recv_async = send_async, recv_async  # type: ignore[method-assign]
        one_step(Layout(Mesh(pp=2), schedule=one_f_one_b), comm, 4, noted)
        return seen

    first, last = Threads({"pp": 2}).run(events)
    # Two layers a stage, with embedding or norm, head and loss; the backwards are not noted.
    assert first.count("post") == first.count("take") == first.count("send") == 4
    # rank 0: F0 F1 | B0 F2 B1 F3 B2 B3; the gradient of F1 is asked for before F2 is computed
    posts = [n for n, event in enumerate(first) if event == "post"]
    takes = [n for n, event in enumerate(first) if event == "take"]
    assert [posts[i] < takes[i] for i in range(4)] == [True] * 4
    # rank 1: the second activation is asked for before the first is worked on
    assert last[:3] == ["post", "take", "compute"]
    second = [n for n, event in enumerate(last) if event == "post"][1]
    taken = [n for n, event in enumerate(last) if event == "take"][1]
    assert second < last.index("send") < taken  # posted before the gradient of the first left


class Held:
    """What autograd saves, counted while it lives."""

    def __init__(self, x: Tensor, counts: dict[str, int]) -> None:
        self.x, self.counts = x, counts
        counts["now"] += 1
        counts["most"] = max(counts["most"], counts["now"])

    def __del__(self) -> None:
        self.counts["now"] -= 1


def most_saved(schedule: Callable[[int, int], Schedule], p: int, m: int) -> list[int]:
    """Return per rank the most tensors that autograd keeps at one time."""

    def main(comm: ThreadComm) -> int:
        counts = {"now": 0, "most": 0}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: Held(x, counts), lambda held: held.x
        )
        with hooks:
            one_step(Layout(Mesh(pp=p), schedule=schedule), comm, m)
        assert counts["now"] == 0, "something is kept after the step"
        return counts["most"]

    gc.collect()
    return Threads({"pp": p}).run(main)


@pytest.mark.parametrize(
    ("schedule", "live"), [(one_f_one_b, (2, 1)), (gpipe, (6, 6)), (zero_bubble_h1, (2, 1))]
)
def test_activations_go_as_soon_as_their_backward_ran(
    schedule: Callable[[int, int], Schedule], live: tuple[int, int]
) -> None:
    """Six microbatches keep no more than the schedule's live ones; one run alone is the unit."""
    one = most_saved(schedule, 2, 1)
    assert most_saved(schedule, 2, 6) == [n * unit for n, unit in zip(live, one, strict=True)]


def test_what_was_sent_goes_as_soon_as_it_has_arrived() -> None:
    """A send keeps its tensor until it is waited for: waiting at the step's end keeps them all."""

    def main(comm: ThreadComm) -> int:
        alive: list[weakref.ref[Tensor]] = []
        most, send = 0, comm.send_async

        def send_async(x: Tensor, axis: str, to: int) -> Callable[[], None]:
            nonlocal most
            alive.append(weakref.ref(x))
            most = max(most, sum(ref() is not None for ref in alive))
            wait = send(x, axis, to)

            def waited(keep: Tensor = x) -> None:
                wait()

            return waited

        comm.send_async = send_async  # type: ignore[method-assign]
        one_step(Layout(Mesh(pp=2), schedule=one_f_one_b), comm, 12)
        return most

    assert max(Threads({"pp": 2}).run(main)) <= 3


def parameters(layout: Layout, comm: Any, transform: Any) -> dict[str, Tensor]:
    """Return the parameters of this rank after two updates on three microbatches."""
    cfg = replace(CFG, num_layers=4 if PIPELINE in layout.mesh.sizes else 1)
    model = gpt(cfg, batch_size=2, dtype=torch.float64)
    step = train_step(model, layout, adamw(1e-2), comm=comm, transform=transform)
    state = step.init(0)
    for _ in range(2):
        state, _ = step(state, [step.local(batch())] * 3)
    names, leaves, _ = flatten_with_names(step.params(state))
    return {name: leaf for name, leaf in zip(names, leaves, strict=True) if leaf is not None}


COMPILER_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@COMPILER_WARNS
def test_compiled_split_bodies_equal_eager_ones() -> None:
    """torch.compile takes the graph, its slots and its backward whole; the kernels stay eager's."""
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    ours = parameters(Layout(schedule=zero_bubble_h1), None, compiled)
    assert_leaves_close(ours, parameters(Layout(), None, lambda fn: fn))


@pytest.mark.full
@COMPILER_WARNS
@pytest.mark.parametrize("schedule", [one_f_one_b, zero_bubble_h1, zero_bubble_v])
@ranks(2, timeout_s=400.0)
def test_stage_bodies_compiled_by_inductor_equal_eager_ones(schedule: Any) -> None:
    layout = Layout(Mesh(pp=2), schedule=schedule)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    ours = parameters(layout, ProcessComm(layout.mesh), compiled)
    assert_leaves_close(ours, parameters(layout, ProcessComm(layout.mesh), lambda fn: fn))


def odd_carry() -> Chain:
    """A chain whose carry is a tree: an integer, a leaf that takes a gradient only after a layer
    of kind "b", and keys in another order in every segment.
    """

    def embed(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        x = F.embedding(consts["tokens"], w["table"])
        noise = consts["weights"] * 2.0  # no gradient flows to it here
        return {"x": x, "more": {"noise": noise, "ids": consts["tokens"]}}, {}

    def pass_on(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        x = carry["x"] + F.linear(carry["x"], w["mix"])
        return {"more": {"ids": carry["more"]["ids"], "noise": carry["more"]["noise"]}, "x": x}, {}

    def change(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        noise = carry["more"]["noise"]
        x = carry["x"] * noise.unsqueeze(-1) + F.linear(carry["x"], w["mix"])
        noise = noise + x.square().mean(-1)
        return {"x": x, "more": {"ids": carry["more"]["ids"], "noise": noise}}, {}

    def head(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        logits = F.linear(carry["x"], w["table"])
        nll = F.cross_entropy(logits, carry["more"]["ids"]) * consts["weights"]
        total = nll.sum() + carry["more"]["noise"].square().sum()
        return None, {"terms": {"loss": (total, consts["weights"].sum())}}

    mix = {"mix": Param("embed_out embed")}
    return Chain(
        segments={
            "embed": Segment(apply=embed, params={"table": Param("vocab embed")}),
            "blocks": Stack(
                kinds={
                    "pass_on": Segment(apply=pass_on, params=mix),
                    "change": Segment(apply=change, params=mix),
                },
                pattern=("pass_on", "change", "pass_on", "change"),
            ),
            "head": Segment(apply=head, borrows={"table": "embed.table"}),
        },
        cfg=None,
        sizes={"batch": 2, "seq": 4, "embed": 8, "embed_out": 8, "vocab": 16},
        batch={
            "tokens": Array("batch seq", torch.int64),
            "weights": Array("batch seq", torch.float64),
        },
        dtype=torch.float64,
    )


@pytest.mark.parametrize("schedule", [one_f_one_b, zero_bubble_h1])
def test_a_carry_is_any_tree_and_gradients_flow_where_types_say(schedule: Any) -> None:
    """Rank 0 hands on a leaf that has no gradient yet, and gets one for it that it must not use."""
    model = odd_carry()
    g = torch.Generator().manual_seed(3)
    batches = [
        {
            "tokens": torch.randint(0, 16, (2, 4), generator=g),
            "weights": torch.rand(2, 4, generator=g, dtype=torch.float64),
        }
        for _ in range(4)
    ]

    def main(layout: Layout, comm: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
        step = train_step(model, layout, adamw(1e-2), comm=comm)
        state = step.init(0)
        for _ in range(3):
            state, metrics = step(state, [step.local(b) for b in batches])
        sent = getattr(comm, "received", {})
        return {"loss": metrics.loss, "norm": metrics.grad_norm}, dict(sent)

    expected, _ = main(Layout(), None)
    layout = Layout(Mesh(pp=4), schedule=schedule)
    found = Threads(layout.mesh.sizes).run(partial(main, layout))
    for got, _ in found:
        assert_leaves_close(got, expected)
    # Per microbatch three tensors go forward; back come gradients of x and noise, none of the ids.
    assert [received for _, received in found] == [
        {1: 24}, {0: 36, 2: 24}, {1: 36, 3: 24}, {2: 36},
    ]  # fmt: skip


def test_virtual_stages_mix_with_tensor_parallelism() -> None:
    rules = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    layout = Layout(Mesh(pp=2, tp=2), rules, schedule=partial(interleaved, num_virtual=2))
    expected = one_step(Layout(), None, 4)
    for got in Threads(layout.mesh.sizes).run(lambda comm: one_step(layout, comm, 4)):
        assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert got.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-5)
