"""What segments return beside the carry comes back from every stage, as on one device."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Array, Param, init
from megatree.functional.tree import flatten_with_names
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.placement import Placement
from megatree.parallel.schedule import interleaved, one_f_one_b, zero_bubble_h1, zero_bubble_v
from megatree.parallel.threads import Threads
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.ranks import ranks
from tests.tolerances import assert_leaves_close

SIZES = {"batch": 4, "seq": 6, "embed": 8, "ffn": 12, "vocab": 16}
BLOCK = {"w_up": Param("ffn embed"), "w_down": Param("ffn embed")}
RULES = Rules(batch="dp", ffn="tp")


def embed(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
    x = shard(F.embedding(consts["tokens"], w["table"]), "batch seq embed")
    return {"x": x, "seen": consts["tokens"]}, {"largest": x.amax(-1)}


def block(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
    h = F.squared_relu(F.linear(carry["x"], w["w_up"]))
    x = carry["x"] + shard(F.einsum("b t f, f d -> b t d", h, w["w_down"]), "batch seq embed")
    out = {
        "terms": {"small": (shard(h.square().sum(), ""), consts["weights"].sum())},
        "pending": h.sum(),  # over dp and tp
        "cut": {"tokens": h.detach().sum(1), "whole": w["w_up"].square().mean(1)},
        "active": (h > 0).sum((0, 1)),
    }
    return {"x": x, "seen": carry["seen"]}, out


def head(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
    logits = F.linear(carry["x"], w["table"])
    nll = F.cross_entropy(logits, consts["labels"]) * consts["weights"]
    right = carry["seen"] == consts["labels"]
    return None, {
        "terms": {"loss": (nll.sum(), consts["weights"].sum())}, "right": right, "nll": nll,
    }  # fmt: skip


MODEL = Chain(
    segments={
        "embed": Segment(apply=embed, params={"table": Param("vocab embed")}),
        "blocks": Stack(
            kinds={
                "a": Segment(apply=block, params=BLOCK),
                "b": Segment(apply=block, params=BLOCK),
            },
            pattern=("a", "b", "b", "a", "b"),
        ),
        "head": Segment(apply=head, borrows={"table": "embed.table"}),
    },
    cfg=None,
    sizes=SIZES,
    batch={
        "tokens": Array("batch seq", torch.int64),
        "labels": Array("batch seq", torch.int64),
        "weights": Array("batch seq", torch.float64),
    },
    dtype=torch.float64,
)


def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    out = []
    for rate in (0.2, 0.8, 0.5, 0.6):
        tokens, labels = torch.randint(0, 16, (2, 4, 6), generator=g)
        weights = (torch.rand(4, 6, generator=g) > rate).double()
        out.append({"tokens": tokens, "labels": labels, "weights": weights})
    return out


def plain() -> dict[str, Tensor]:
    """The metrics of the plain model on whole tensors, microbatch by microbatch: the oracle."""
    params = init(MODEL.params, SIZES, 0, dtype=torch.float64)
    outs = [MODEL.apply(params, batch)[1] for batch in batches()]
    for out in outs:
        for kinds in (out, *(out["blocks"].values())):
            kinds.pop("terms", None)
        out["head"].pop("terms", None)
    trees: list[Any] = outs
    whole = optree.tree_map(lambda *leaves: torch.stack(leaves).detach(), *trees)
    names, leaves, _ = flatten_with_names(whole)
    return dict(zip(names, leaves, strict=True))


def run(layout: Layout, comm: Any = None) -> tuple[Mapping[str, Tensor], ...]:
    """Return terms and metrics of an evaluation, then of the first step and of the second."""
    step = train_step(MODEL, layout, adamw(1e-2), comm=comm)
    state = step.init(0)
    local = [step.local(batch) for batch in batches()]
    terms, outs = step.forward(local)
    state, first = step(state, local)
    _, second = step(state, local)
    return terms, outs, first.terms, first.outs, second.terms, second.outs


def same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, x in expected.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        if not x.is_floating_point():
            assert torch.equal(got[name], x), name
    floats = sorted(name for name, x in expected.items() if x.is_floating_point())
    assert_leaves_close({n: got[n] for n in floats}, {n: expected[n] for n in floats})


LAYOUTS = {
    "pp4": Layout(Mesh(pp=4), schedule=one_f_one_b),
    "pp2 dp2 tp2": Layout(Mesh(pp=2, dp=2, tp=2), RULES, schedule=zero_bubble_h1),
    "pp2 tp2, a V": Layout(Mesh(pp=2, tp=2), RULES, schedule=zero_bubble_v),
    "pp2 dp2, virtual": Layout(
        Mesh(pp=2, dp=2), RULES, schedule=partial(interleaved, num_virtual=2)
    ),
    "a stage without layers": Layout(
        Mesh(pp=4), placement=Placement(layers_per_stage=(0, 4, 1, 0)), schedule=one_f_one_b
    ),
}


def test_metrics_on_one_device_are_those_of_the_plain_model() -> None:
    _, evaluated, _, first, _, _ = run(Layout())
    same(first, plain())
    same(evaluated, plain())
    assert first["blocks.b.cut.tokens"].shape == (4, 3, 4, 12)  # microbatches, layers, value


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_and_auxiliary_terms_come_back_from_every_stage(name: str) -> None:
    """Terms of every layer, pending sums, shards, integers and flags; training and evaluation."""
    expected = run(Layout())
    assert set(expected[2]) == {"loss", "small"}
    for got in Threads(LAYOUTS[name].mesh.sizes).run(lambda comm: run(LAYOUTS[name], comm)):
        for mine, whole in zip(got, expected, strict=True):
            same(mine, whole)


@ranks(2)
def test_metrics_come_back_between_processes() -> None:
    layout = Layout(Mesh(pp=2), schedule=one_f_one_b)
    for mine, whole in zip(run(layout, ProcessComm(layout.mesh)), run(Layout()), strict=True):
        same(mine, whole)
