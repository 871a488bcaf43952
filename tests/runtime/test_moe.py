"""Decoders with experts on a mesh against one device: every loss term and all gradients, the
router's included; and the ways in which expert gradients are known to go wrong.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.router import balance_loss
from megatree.functional.tree import flatten_with_names
from megatree.models.moe import moe
from megatree.models.moe_config import MoEConfig
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.remat import Remat
from megatree.parallel.schedule import interleaved, one_f_one_b, zero_bubble_h1
from megatree.parallel.simulate import simulate
from megatree.parallel.storage import Storage
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.runtime.lowered_once import lowered_once
from tests.runtime.moe_cases import (
    BATCH,
    CAPPED,
    EXPERTS,
    LAYOUTS,
    MODELS,
    SEQ,
    SIZES,
    TP,
    assert_exact,
    layout_of,
    objective,
    reference,
)
from tests.runtime.one_device import gradients_on, rank_inputs
from tests.tolerances import assert_leaves_close

DEFAULT = {
    "dropless": ("ep2", "folded", "zigzag ring"),
    "shared": ("dp2 ep4", "over cp"),
    "capped": ("dp2 ep2",),
    "padded": ("folded", "ep2 etp2"),
    "biased": ("ep2 etp2", "ep2 cp2 tp2"),
    "jittered": ("over cp",),
    "sinkhorn": ("zigzag ring",),
}
ROWS = [
    pytest.param(m, name, marks=() if name in DEFAULT[m] else pytest.mark.full)
    for m in MODELS
    for name in LAYOUTS
]


@pytest.mark.parametrize(("model", "layout"), ROWS)
def test_terms_and_gradients_are_those_of_one_device(model: str, layout: str) -> None:
    assert_exact(*reference(MODELS[model]), layout_of(LAYOUTS[layout], MODELS[model]))


ZERO = {
    "zero-1": Storage(opt=("dp",)),
    "zero-3": Storage(params=("dp",), grads=("dp",), opt=("dp",)),
}


@pytest.mark.parametrize(
    ("model", "storage", "name"),
    [
        ("dropless", "zero-1", "dp2 ep2"),
        ("dropless", "zero-3", "dp2 ep2"),
        *(
            pytest.param(model, storage, name, marks=pytest.mark.full)
            for model in ("dropless", "padded")
            for storage in ZERO
            for name in ("folded", "dp2 ep4")
        ),
    ],
)
def test_storage_cuts_experts_and_the_rest(model: str, storage: str, name: str) -> None:
    """Experts have copies on a part of the mesh only, over which alone they can be cut."""
    cfg = MODELS[model]
    assert_exact(*reference(cfg), replace(layout_of(LAYOUTS[name], cfg), storage=ZERO[storage]))


@pytest.mark.parametrize("model", ["dropless", pytest.param("padded", marks=pytest.mark.full)])
def test_layers_that_run_again_send_the_same_rows(model: str) -> None:
    assert_exact(*reference(MODELS[model]), replace(LAYOUTS["ep2"], remat=Remat(policy="full")))


# -- pipelines ----------------------------------------------------------------------------------

PIPELINES: dict[str, Layout] = {
    "pp2 ep2": Layout(
        Mesh(pp=2, ep=2), Rules(batch="ep", experts="ep"), schedule=one_f_one_b
    ),
    "pp2 folded": Layout(
        Mesh(pp=2, dp=2, tp=2).refine(ep=4),
        Rules(batch="dp", experts="ep", seq_res="tp", seq_moe="tp", **TP),
        schedule=zero_bubble_h1,
        storage=ZERO["zero-1"],
    ),
    "interleaved": Layout(
        Mesh(pp=2, ep=2),
        Rules(batch="ep", experts="ep"),
        schedule=lambda ranks, microbatches: interleaved(ranks, microbatches, num_virtual=2),
    ),
}  # fmt: skip


def steps(cfg: MoEConfig, layout: Layout, comm: ThreadComm | None = None) -> list[Tensor]:
    """Train two steps; return their terms, norms and the metrics of the first."""
    ref, _ = reference(cfg)
    step = train_step(ref.model, layout, adamw(1e-2), comm=comm, max_norm=0.5)
    state = step.init(0)
    seen: list[Tensor] = []
    local = [step.local(batch) for batch in ref.batches]
    for _ in range(2):
        state, metrics = step(state, local)
        seen += [*metrics.terms.values(), metrics.grad_norm.double()]
    outs = metrics.outs
    return [*seen, *(outs[name] for name in sorted(outs))]


@cache
def alone(cfg: MoEConfig) -> list[Tensor]:
    return steps(cfg, Layout())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("dropless", "pp2 ep2"),
        pytest.param("shared", "pp2 folded", marks=pytest.mark.full),
        pytest.param("padded", "pp2 folded", marks=pytest.mark.full),
        pytest.param("biased", "pp2 folded", marks=pytest.mark.full),
        pytest.param("biased", "pp2 ep2", marks=pytest.mark.full),
        pytest.param("four layers", "interleaved", marks=pytest.mark.full),
    ],
)
def test_pipelines_train_as_one_device(model: str, name: str) -> None:
    """Terms, norms and metrics of two steps: a gradient off by a factor shows in the second."""
    four = replace(MODELS["dropless"], num_layers=4, every=2)
    cfg = MODELS.get(model, four)
    layout = layout_of(PIPELINES[name], cfg)
    with lowered_once():
        ranks = Threads(layout.mesh.sizes).run(lambda comm: steps(cfg, layout, comm))
    for seen in ranks:
        for got, want in zip(seen, alone(cfg), strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=1e-11, atol=1e-11)


# -- known ways to scale a gradient wrongly -----------------------------------------------------


def grads_of(cfg: MoEConfig, layout: Layout, batches: Any = None) -> tuple[dict, dict]:
    """Return terms and whole gradients of one rank whose mesh cuts no leaf but experts."""
    ref, _ = reference(cfg)
    ref = replace(ref, batches=tuple(batches or ref.batches))
    program = lower_model(ref.model, layout)

    def rank_main(comm: ThreadComm) -> tuple[dict, list[Tensor]]:
        params, local = rank_inputs(ref, program, comm)
        values, grads = gradients_on(program, comm, params, local)
        return values, optree.tree_leaves(grads)

    values, leaves = Threads(layout.sizes).run(rank_main)[0]
    return values, dict(zip(flatten_with_names(ref.model.params)[0], leaves, strict=True))


def test_trap_experts_are_summed_over_their_copies_and_never_averaged() -> None:
    """Experts have 2 copies and the rest 4: a mean over either would be off by a factor."""
    program = lower_model(reference(MODELS["dropless"])[0].model, LAYOUTS["dp2 ep2"])
    sync = program.sync
    assert {sync[f"blocks.moe.{w}"] for w in ("w_gate", "w_up", "w_down")} == {("dp",)}
    assert sync["blocks.moe.router"] == sync["blocks.moe.wq"] == ("dp", "ep")
    _, got = grads_of(MODELS["dropless"], LAYOUTS["dp2 ep2"])
    expected = reference(MODELS["dropless"])[0].grads["blocks.moe.w_down"][:, : EXPERTS // 2]
    ratio = (got["blocks.moe.w_down"] * expected).sum() / expected.square().sum()
    assert ratio.item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    "name",
    ["ep2 etp2", *(pytest.param(n, marks=pytest.mark.full) for n in ("dp2 ep2 etp2", "folded"))],
)
def test_trap_the_norm_counts_every_expert_once(name: str) -> None:
    """Experts cut over ep and tp, with copies or without: no part missing, none counted twice."""
    cfg = MODELS["dropless"]
    ref, _ = reference(cfg)

    def rank_main(comm: ThreadComm | None, layout: Layout) -> float:
        step = train_step(ref.model, layout, adamw(0.0), comm=comm)
        state = step.init(0)
        _, metrics = step(state, [step.local(batch) for batch in ref.batches])
        return metrics.grad_norm.item()

    expected = rank_main(None, Layout())
    layout = layout_of(LAYOUTS[name], cfg)
    with lowered_once():
        norms = Threads(layout.sizes).run(lambda comm: rank_main(comm, layout))
    for norm in norms:
        assert norm == pytest.approx(expected, rel=1e-12)


def test_trap_the_auxiliary_loss_does_not_grow_with_microbatches_or_ranks() -> None:
    """The same microbatch once or three times, on one rank or four: the same term and gradient."""
    cfg = MODELS["dropless"]
    ref, _ = reference(cfg)
    first = ref.batches[:1]
    values, grads = grads_of(cfg, Layout(), first)
    for layout, times in ((Layout(), 3), (LAYOUTS["ep2"], 1), (LAYOUTS["dp2 ep2"], 2)):
        others, found = grads_of(cfg, layout, first * times)
        for name in ("balance", "router_z", "loss"):
            assert others[name].item() == pytest.approx(values[name].item(), rel=1e-12)
        router = "blocks.moe.router"
        assert (found[router] - grads[router]).norm() < 1e-12 * grads[router].norm()


def test_trap_balance_refuses_counts_that_are_not_summed() -> None:
    """Counts of one rank times probabilities of all: the types say so before anything runs."""

    def careless(logits: Tensor) -> Tensor:
        counts = F.expert_counts(F.top_k(logits, 2)[1], num_experts=4).sum(0)
        return balance_loss(F.router_probabilities(logits), counts, k=2)

    with pytest.raises(ShardingError, match=r"pending sum over mesh axis 'ep'"):
        simulate(
            careless,
            Layout(Mesh(ep=2), Rules(batch="ep")),
            torch.zeros(2, 3, 4, dtype=torch.float64),
            axes=("batch seq choices",),
        )


def test_trap_balance_takes_the_product_of_whole_sums() -> None:
    """The mean over ranks of every rank's own loss is another number, and is not what we report."""
    cfg = MODELS["dropless"]
    ref, _ = reference(cfg)
    whole, _ = grads_of(cfg, Layout(), ref.batches[:1])
    halves = []
    model = moe(cfg, batch_size=BATCH // 2, dtype=torch.float64)
    for half in (slice(0, 4), slice(4, 8)):
        batch = {k: v[half] for k, v in ref.batches[0].items()}
        halves.append(objective(model, ref.params, [batch])["balance"].item())
    assert abs(sum(halves) / 2 / whole["balance"].item() - 1) > 1e-3
    cut, _ = grads_of(cfg, LAYOUTS["ep2"], ref.batches[:1])
    assert cut["balance"].item() == pytest.approx(whole["balance"].item(), rel=1e-12)


def test_trap_counts_are_the_same_after_every_reading() -> None:
    """Counts that were reduced in place grew with every read, and with every forward run again."""
    ref, _ = reference(MODELS["dropless"])
    layout = replace(LAYOUTS["ep2"], remat=Remat(policy="full"))

    def loads(comm: ThreadComm) -> list[Tensor]:
        step = train_step(ref.model, layout, adamw(0.0), comm=comm)
        state, out = step.init(0), []
        for _ in range(3):
            state, metrics = step(state, [step.local(batch) for batch in ref.batches])
            out.append(next(v for k, v in sorted(metrics.outs.items()) if k.endswith("load")))
        return out

    with lowered_once():
        ranks = Threads(layout.sizes).run(loads)
    for first, *others in ranks:
        assert first.shape[-1] == EXPERTS
        assert (first.sum(-1) == BATCH * SEQ * 2).all()
        assert all(torch.equal(first, other) for other in others)


# -- loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["dropless", pytest.param("padded", marks=pytest.mark.full)])
def test_an_expert_without_tokens_and_one_with_all(model: str) -> None:
    """A router that sends every token to the same two experts, on the mesh and on one device."""
    cfg = MODELS[model]
    ref, _ = reference(cfg)
    params: Any = optree.tree_map(torch.clone, ref.params)
    params["blocks"]["moe"]["router"].zero_()  # ties: all choose the same experts
    model_ = ref.model
    leaves = optree.tree_map(lambda w: w.clone().requires_grad_(), params)
    terms = objective(model_, leaves, ref.batches)
    # Of even probabilities both losses are known: 1, and log(experts)^2, of two layers.
    assert terms["balance"].item() == pytest.approx(0.3 * 2, rel=1e-6)
    assert terms["router_z"].item() == pytest.approx(0.2 * 2 * math.log(EXPERTS) ** 2, rel=1e-6)
    torch.stack(list(terms.values())).sum().backward()
    names, flat, _ = flatten_with_names(leaves)
    expected = {name: leaf.grad for name, leaf in zip(names, flat, strict=True)}
    idle = expected["blocks.moe.w_up"].flatten(2).norm(dim=2)
    assert (idle == 0).sum() == 2 * (EXPERTS - 2)
    at = replace(ref, params=params, grads=expected)
    layout = LAYOUTS["ep8"]
    program = lower_model(model_, layout)

    def rank_main(comm: ThreadComm) -> list[Tensor]:
        local, batches = rank_inputs(at, program, comm)
        return optree.tree_leaves(gradients_on(program, comm, local, batches)[1])

    results = Threads(layout.sizes).run(rank_main)
    place = names.index("blocks.moe.w_up")
    got = torch.cat([grads[place] for grads in results], 1)
    assert_leaves_close({"w_up": got}, {"w_up": expected["blocks.moe.w_up"]})


def test_metrics_say_load_drops_and_entropy() -> None:
    ref, _ = reference(CAPPED)
    _, outs = ref.model.apply(ref.params, ref.batches[0])
    metrics = outs["blocks"]["moe"]
    load, drops = metrics["load"], metrics["drops"]
    assert load.shape == (2, EXPERTS)
    assert torch.equal((load + drops).sum(1), torch.full((2,), BATCH * SEQ * 2.0))
    room = math.ceil(SEQ * 2 / EXPERTS * 0.75)
    assert (load <= BATCH * room).all()
    assert (drops >= 0).all()
    assert (drops.sum(1) > 0).all()
    share = load / load.sum(1, keepdim=True)
    torch.testing.assert_close(metrics["entropy"], torch.distributions.Categorical(share).entropy())


def test_padding_changes_no_value() -> None:
    got, terms = reference(MODELS["padded"])
    want, others = reference(MODELS["capped"])
    assert_leaves_close({**terms, **got.grads}, {**others, **want.grads})


def test_a_dropless_layer_costs_one_look_of_the_host_and_a_padded_one_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
        plain = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _name: str = name, _plain: Any = plain) -> Any:
            looks.append(_name)
            return _plain(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    for model, per_layer in (("dropless", 1), ("padded", 0)):
        ref, _ = reference(MODELS[model])
        looks.clear()
        ref.model.apply(ref.params, ref.batches[0])
        assert looks == ["tolist"] * (per_layer * 2)


def test_a_plan_counts_the_traffic_of_experts() -> None:
    """Dropless rows are planned as even loads: as many bytes as choices, there and back."""
    for model, rows in (("dropless", BATCH // 2 * SEQ * 2), ("padded", BATCH // 2 * EXPERTS * 2)):
        program = lower_model(reference(MODELS[model])[0].model, LAYOUTS["ep2"])
        calls = program.units["blocks.moe"].program.collectives
        sent = [c.bytes for c in calls if c.kind.startswith("all_to_all") and c.phase == "forward"]
        row, gate = SIZES["embed"] * 8, 8
        assert sent[-3:] == [rows * row, rows * gate, rows * row]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "mesh", "text"),
    [
        ({"batch": "dp", "experts": "ep"}, Mesh(ep=3), r"experts.*8.*3|8 .*ep.*3"),
        (
            {"experts": "ep"},
            Mesh(ep=2),
            r"does not say what it is over mesh axis 'ep', on which an input .* varies\. In rules, "
            r"take the mesh axes of 'experts' from those of 'batch' and 'seq_moe'",
        ),
        (
            {"batch": "dp", "experts": "dp", "expert_ffn": "tp", "seq_moe": "tp"},
            Mesh(dp=2, tp=2),
            r"output 0 \('batch seq_moe embed'\) is cut over mesh axis 'tp', and declared partial",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused(rules: Any, mesh: Mesh, text: str) -> None:
    model = reference(MODELS["dropless"])[0].model
    with pytest.raises(ShardingError, match=text):
        lower_model(model, Layout(mesh, Rules(**rules)))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"top_k": 0}, r"^MoEConfig: top_k is 0\. Give at least 1\."),
        ({"embed": 0}, r"^GPTConfig: embed is 0\. Give at least 1\."),
        ({"top_k": 9}, r"top_k is 9, and there are 8 experts\. Give at most 8\."),
        ({"pad_to_capacity": True}, r"pad_to_capacity without capacity_factor: .*Give a capacity"),
        ({"capacity_factor": 0.0}, r"capacity_factor is 0\.0\. Give a positive number\."),
        ({"capacity_factor": math.nan}, r"capacity_factor is nan\. Give a positive number\."),
        ({"route_scale": math.inf}, r"route_scale is inf\. Give a positive number\."),
        (
            {"score": "sigmoid", "pre_softmax": True},
            r"pre_softmax with score 'sigmoid', .* Take pre_softmax=False\.",
        ),
        ({"score": "tanh"}, r"score is 'tanh'\. Use one of softmax, sigmoid, sqrtsoftplus\."),
        ({"dense_first": 2}, r"dense_first is 2 of 2 layers\. Leave at least one"),
        ({"bias": True}, r"bias=True, and experts have none\."),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(MODELS["dropless"], **fields)
