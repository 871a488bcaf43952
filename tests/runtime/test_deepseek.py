"""A decoder shaped as DeepSeek-V3 (latent attention, a dense layer first, experts beside a shared
one, a layer that predicts one token further) on a mesh against one device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from megatree.functional.chain import Chain, Stack
from megatree.functional.tree import flatten_with_names
from megatree.models.decoder import decoder
from megatree.models.moe_config import MoEConfig
from megatree.parallel.context import AllGather, Ring, Ulysses
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.order import Zigzag
from megatree.parallel.placement import Placement
from megatree.parallel.remat import Remat
from megatree.parallel.schedule import interleaved, one_f_one_b, zero_bubble_h1
from megatree.parallel.storage import Storage
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.runtime.lowered_once import lowered_once
from tests.runtime.moe_cases import assert_exact, draw_weights
from tests.runtime.one_device import Reference, gradients_on, rank_inputs

BATCH, SEQ, VOCAB = 8, 8, 50
CFG = MoEConfig(
    vocab_size=VOCAB, vocab_pad=8, seq_length=SEQ, num_layers=2, embed=16, kv_heads=4, head_dim=6,
    ffn=16, kv_rank=8, q_rank=12, rope_dim=4, value_dim=5, yarn=(4.0, 2.0, 0.5, 8.0, 1.0, 1.0),
    experts=8, top_k=4, expert_ffn=4, score="sigmoid", groups=4, group_top_k=2, route_scale=2.5,
    shared_ffn=8, dense_first=1, balance=0.3, balance_over="sequence", mtp=1,
)  # fmt: skip
TWICE = replace(CFG, mtp=2, fused_loss=True, tied=True)
BIASED = replace(CFG, bias_rate=0.01, balance_over="global", jitter=0.1)
_TP: dict[str, Any] = {"kv_heads": "tp", "ffn": "tp", "shared_ffn": "tp", "vocab": "tp"}
_FOLDED = Mesh(dp=4, tp=2).refine(ep=4)


def _cp(how: Any) -> Layout:
    rules = {"seq": "cp", "seq_res": ("cp", "tp"), "seq_moe": ("cp", "tp")}
    return Layout(
        Mesh(cp=2, tp=2),
        Rules(**rules, experts=("cp", "tp"), **_TP, lower={"attention": how}),
        order=Zigzag(),
    )


LAYOUTS: dict[str, Layout] = {
    "one rank": Layout(),
    "dp2": Layout(Mesh(dp=2), Rules(batch="dp")),
    "ep2": Layout(Mesh(ep=2), Rules(batch="ep", experts="ep")),
    "dp2 ep2": Layout(Mesh(dp=2, ep=2), Rules(batch=("dp", "ep"), experts="ep")),
    "ep2 tp2": Layout(Mesh(ep=2, tp=2), Rules(batch="ep", experts="ep", **_TP)),
    "ep2 etp2": Layout(
        Mesh(ep=2, tp=2), Rules(batch="ep", experts="ep", expert_ffn="tp", seq_res="tp", **_TP)
    ),
    "folded": Layout(_FOLDED, Rules(batch="dp", experts="ep", seq_res="tp", seq_moe="tp", **_TP)),
    "ring": _cp(Ring()),
    "gathered": _cp(AllGather()),
    "ulysses": _cp(Ulysses()),
}
DEFAULT = {"one": {"one rank", "ep2 etp2", "ring"}, "two": set()}
MODELS = {"one": CFG, "two": TWICE, "biased": BIASED}


def terms_of(model: Chain, params: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return every term as the step takes it: of each layer, over the weight of all batches."""
    pairs: dict[tuple[str, ...], list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        _, outs = model.apply(params, batch)
        for name, out in outs.items():
            kinds = out if isinstance(model.segments[name], Stack) else {"": out}
            for kind, found in kinds.items():
                for term, pair in found.get("terms", {}).items():
                    pairs.setdefault((term, name, kind), []).append(pair)
    values: dict[str, Any] = {}
    for (term, _, _), found in pairs.items():
        total, weight = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
        values[term] = values.get(term, 0.0) + (total / weight).sum()
    return values


@cache
def model_of(cfg: MoEConfig) -> Chain:
    return decoder(cfg, batch_size=BATCH, dtype=torch.float64)


@cache
def reference(cfg: MoEConfig) -> tuple[Reference, Mapping[str, Tensor]]:
    """Draw weights and two microbatches; return them with the gradients, and the terms' values."""
    model = model_of(cfg)
    draw = torch.Generator().manual_seed(0)

    params = draw_weights(model, draw)
    batches = []
    for number in range(2):
        tokens, labels = torch.randint(VOCAB, (2, BATCH, SEQ), generator=draw)
        kept = (torch.rand((BATCH, SEQ), generator=draw) < 1 / (2 + number)).float()
        kept[: 3 + number] = 0.0  # ranks have unequal counts, some none
        batches.append({"tokens": tokens, "labels": labels, "weights": kept})
    leaves = optree.tree_map(lambda w: w.clone().requires_grad_(), params)
    terms = terms_of(model, leaves, batches)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    names, flat, _ = flatten_with_names(leaves)
    grads = {name: leaf.grad for name, leaf in zip(names, flat, strict=True)}
    values = {name: value.detach() for name, value in terms.items()}
    return Reference(model, params, tuple(batches), total.detach(), grads), values


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(m, name, marks=() if name in DEFAULT[m] else pytest.mark.full)
        for m in DEFAULT
        for name in LAYOUTS
    ],
)
def test_terms_and_gradients_are_those_of_one_device(model: str, name: str) -> None:
    ref, terms = reference(MODELS[model])
    assert {"loss", "mtp", "balance"} == set(terms)
    assert_exact(ref, terms, LAYOUTS[name])


PIPELINES: dict[str, Layout] = {
    # embedding and a dense layer; a mixture, the head, and what predicts further
    "pp2 ep2": Layout(
        Mesh(pp=2, ep=2), Rules(batch="ep", experts="ep"), Placement(layers_per_stage=(1, 2)),
        one_f_one_b,
    ),
    "pp2 tp2 sp": Layout(
        Mesh(pp=2, tp=2),
        Rules(seq_res="tp", seq_moe="tp", experts="tp", **_TP),
        Placement(layers_per_stage=(2, 1)),
        zero_bubble_h1,
    ),
    "pp2 cp2 tp2": Layout(
        Mesh(pp=2, cp=2, tp=2),
        Rules(seq="cp", seq_res=("cp", "tp"), seq_moe=("cp", "tp"), experts=("cp", "tp"), **_TP,
              lower={"attention": Ring()}),
        schedule=one_f_one_b,
        order=Zigzag(),
    ),
    "interleaved": Layout(
        Mesh(pp=2, dp=2, ep=2),
        Rules(batch=("dp", "ep"), experts="ep"),
        Placement(layers_per_stage=(1, 1, 1, 1)),
        partial(interleaved, num_virtual=2),
        remat=Remat(policy="full"),
    ),
}  # fmt: skip


def steps(cfg: MoEConfig, layout: Layout, comm: ThreadComm | None = None) -> dict[str, Tensor]:
    """Train two steps; return their terms and norms."""
    ref, _ = reference(CFG)
    step = train_step(model_of(cfg), layout, adamw(1e-2), comm=comm, max_norm=0.5)
    if layout.schedule is not None:
        assert step.program.holders("embed.table", 0) == (0, 1)
    state, seen = step.init(0), {}
    local = [step.local(batch) for batch in ref.batches]
    for number in range(2):
        state, metrics = step(state, local)
        seen |= {f"{name} {number}": x.double() for name, x in metrics.terms.items()}
        seen[f"norm {number}"] = metrics.grad_norm.double()
    return seen


@cache
def alone(cfg: MoEConfig) -> dict[str, Tensor]:
    return steps(cfg, Layout())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("one", "pp2 ep2"),
        pytest.param("one", "pp2 tp2 sp", marks=pytest.mark.full),
        pytest.param("one", "pp2 cp2 tp2", marks=pytest.mark.full),
        pytest.param("two", "pp2 cp2 tp2", marks=pytest.mark.full),
        pytest.param("two", "interleaved", marks=pytest.mark.full),
        pytest.param("biased", "pp2 ep2", marks=pytest.mark.full),
    ],
)
def test_pipelines_train_as_one_device(model: str, name: str) -> None:
    """The embedding is on the first stage and on the last; a sum that is missing, or made twice,
    shows in the norm of the first step and in the terms of the second.
    """
    cfg, layout = MODELS[model], PIPELINES[name]
    with lowered_once():
        ranks = Threads(layout.mesh.sizes).run(lambda comm: steps(cfg, layout, comm))
    for seen in ranks:
        for name, value in alone(cfg).items():
            torch.testing.assert_close(seen[name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("one", PIPELINES["pp2 ep2"]),
        pytest.param(
            "one",
            replace(LAYOUTS["dp2 ep2"], storage=Storage("dp", "dp", "dp")),
            marks=pytest.mark.full,
        ),
        pytest.param("two", PIPELINES["interleaved"], marks=pytest.mark.full),
    ],
    ids=["one-pp2 ep2", "one-zero-3", "two-interleaved"],
)
def test_evaluation_computes_nothing_further(model: str, layout: Layout) -> None:
    """The decoder's loss, by the placement of training; no product and no message behind it."""
    cfg = MODELS[model]
    ref, _ = reference(cfg)

    def rank_main(comm: ThreadComm) -> tuple[dict[str, Tensor], dict[str, int]]:
        step = train_step(ref.model, layout, adamw(0.0), comm=comm)
        step.init(0)
        terms = step.evaluate([step.local(batch) for batch in ref.batches])
        calls = {
            name: sum(node.op == "call_function" for node in unit.program.graph.nodes)
            for name, unit in step.evaluation.program.units.items()
        }
        return terms, calls

    plain = decoder(replace(cfg, mtp=None, balance=None), batch_size=BATCH, dtype=torch.float64)
    alone = train_step(plain, Layout(), adamw(0.0))
    alone.init(0)
    expected = alone.evaluate([alone.local(batch) for batch in ref.batches])
    further = ("depth1", "depth2")[: cfg.mtp]
    with lowered_once():
        ranks = Threads(layout.mesh.sizes).run(rank_main)
    for terms, calls in ranks:
        assert {name for name, n in calls.items() if n == 0} == {"mtp." + k for k in further}
        assert set(terms) == {"loss"}
        torch.testing.assert_close(terms["loss"], expected["loss"], rtol=1e-12, atol=0.0)


# -- known ways to be wrong ------------------------------------------------------------------------


def test_trap_mtp_normalised_by_local_counts() -> None:
    """Two ranks and two microbatches have unequal counts: the mean of their means is another
    number than the mean over all, and a rank without any would divide 0 by 0.
    """
    ref, terms = reference(CFG)
    by_hand, whole = [], []
    model = decoder(CFG, batch_size=4, dtype=torch.float64)
    for batch in ref.batches:
        for half in (slice(0, 4), slice(4, 8)):
            _, outs = model.apply(ref.params, {k: v[half] for k, v in batch.items()})
            total, weight = (x.item() for x in outs["mtp"]["depth1"]["terms"]["mtp"])
            whole.append((total, weight))
            by_hand.append(total / weight if weight else 0.0)
    assert len({weight for _, weight in whole}) > 2
    expected = sum(t for t, _ in whole) / sum(w for _, w in whole)
    assert abs(sum(by_hand) / len(by_hand) / expected - 1) > 0.05
    assert terms["mtp"].item() == pytest.approx(expected, rel=1e-12)
    layout = LAYOUTS["dp2"]
    program = lower_model(ref.model, layout)

    def rank_main(comm: ThreadComm) -> float:
        values, _ = gradients_on(program, comm, *rank_inputs(ref, program, comm))
        return values["mtp"].item()

    for value in Threads(layout.sizes).run(rank_main):
        assert value == pytest.approx(expected, rel=1e-12)


def test_trap_a_local_mean_is_refused_by_the_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that divides by its own count: a pending sum in a denominator."""
    kind = reference(CFG)[0].model.segments["mtp"]
    assert isinstance(kind, Stack)
    segment = kind.kinds["depth1"]

    def careless(w: Any, carry: Any, consts: Any, cfg: Any, *, state: Any = None) -> Any:
        x, out = segment.apply(w, carry, consts, cfg, state=state)
        total, weight = out["terms"]["mtp"]
        return x, {"terms": {"mtp": (total / weight, torch.ones(()))}}

    model = reference(CFG)[0].model
    stack = Stack(kinds={"depth1": replace(segment, apply=careless)}, pattern=("depth1",))
    wrong = replace(model, segments={**model.segments, "mtp": stack})
    lower_model(wrong, Layout())
    with pytest.raises(ShardingError, match=r"pending sum over mesh axis 'dp'"):
        lower_model(wrong, LAYOUTS["dp2"])
