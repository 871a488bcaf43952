"""Recomputation and offload change what is held, and no bit of a loss or a gradient."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.packing import pack
from megatree.parallel.plan import StagePlan, estimate, plan
from megatree.parallel.remat import Remat
from megatree.parallel.schedule import (
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.parallel.storage import Storage
from megatree.parallel.threads import Threads
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from megatree.runtime.weights import Weights
from tests.ranks import ranks
from tests.runtime.live import Live, Made

GPT2 = GPTConfig(
    vocab_size=50, seq_length=8, num_layers=4, embed=16, kv_heads=4, head_dim=4, ffn=16,
    vocab_pad=8, norm="layer", positions="learned", activation="gelu", bias=True, tied=True,
)  # fmt: skip
LLAMA = replace(
    GPT2, norm="rms", positions="rotary", activation="swiglu", bias=False, tied=False, dropout=0.1
)
SP = Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
ZERO_3 = Storage(params="dp", grads="dp", opt="dp")
ALL = ("attention", "norm", "activation", "rope", "dropout")
POLICIES = {
    "full, one by one": Remat(policy="full"),
    "full, by three": Remat(policy="full", layers=3),
    "full, first layer": Remat(policy="full", method="block"),
    "selective": Remat(policy="selective"),
    "selective, gathered again": Remat(policy="selective", ops=ALL, regather=True),
    "offload": Remat(offload=True),
    "full, offload": Remat(policy="full", offload=True),
    "selective, offload": Remat(policy="selective", offload=True, keep_weights=True),
}
FEW = ("full, by three", "selective, gathered again", "selective, offload")
LAYOUTS = {
    "one device": Layout(),
    "tp2 sp": Layout(Mesh(tp=2), SP.updated(batch=None)),
    "dp2 zero-3": Layout(Mesh(dp=2), Rules(batch="dp"), storage=ZERO_3),
    "pp2 1f1b": Layout(Mesh(pp=2), schedule=one_f_one_b),
    "pp2 zb-h1": Layout(Mesh(pp=2), schedule=zero_bubble_h1),
}
MORE_LAYOUTS = {
    "pp2 gpipe": Layout(Mesh(pp=2), schedule=gpipe),
    "pp2 interleaved": Layout(Mesh(pp=2), schedule=partial(interleaved, num_virtual=2)),
    "pp2 zb-v": Layout(Mesh(pp=2), schedule=zero_bubble_v),
    "pp2 tp2 sp zb-v": Layout(Mesh(pp=2, tp=2), SP.updated(batch=None), schedule=zero_bubble_v),
    "pp2 dp2 zero-3 zb-h1": Layout(
        Mesh(pp=2, dp=2), Rules(batch="dp"), schedule=zero_bubble_h1, storage=ZERO_3
    ),
}

Ran = tuple[Tensor, dict[str, Tensor], dict[str, int]]


def batches(cfg: GPTConfig, count: int = 2) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    out = []
    for number in range(count):
        tokens, labels = torch.randint(0, 50, (2, 4, cfg.seq_length), generator=g)
        weights = (torch.rand(4, cfg.seq_length, generator=g) > 0.2 + 0.3 * number).float()
        out.append({"tokens": tokens, "labels": labels, "weights": weights})
    return out


def ran(cfg: GPTConfig, layout: Layout, comm: Any = None, transform: Any = lambda fn: fn) -> Ran:
    """Make a step; return the loss, all gradients and the collectives executed."""
    model = gpt(cfg, batch_size=4, dtype=torch.float64)
    step = train_step(model, layout, adamw(1e-2), comm=comm, transform=transform)
    state = step.init(0)
    before = dict(getattr(comm, "counts", {}))
    state, metrics = step(state, [step.local(b) for b in batches(cfg)])
    executed = {k: n - before.get(k, 0) for k, n in getattr(comm, "counts", {}).items()}
    stored = step.gradients.sums.stored
    return metrics.loss, {group.name: stored[group.name].clone() for group in step.groups}, executed


def on_all_ranks(cfg: GPTConfig, layout: Layout) -> list[Ran]:
    if not layout.mesh.sizes:
        return [ran(cfg, layout)]
    return Threads(layout.mesh.sizes).run(lambda comm: ran(cfg, layout, comm))


@cache
def without(cfg: GPTConfig, layout: Layout) -> list[Ran]:
    return on_all_ranks(cfg, layout)


def again(cfg: GPTConfig, layout: Layout) -> dict[str, int]:
    """Return the collectives that a plan says a step of one pipeline rank repeats."""
    made = plan(gpt(cfg, batch_size=4, dtype=torch.float64), layout, num_microbatches=2)
    out: dict[str, int] = {}
    for c in made.collectives:
        if c.phase == "recompute":
            out[c.kind] = out.get(c.kind, 0) + c.count
    return out


def check(cfg: GPTConfig, layout: Layout, remat: Remat) -> None:
    expected, found = without(cfg, layout), on_all_ranks(cfg, replace(layout, remat=remat))
    for (loss, grads, counts), (loss0, grads0, counts0) in zip(found, expected, strict=True):
        assert torch.equal(loss, loss0)
        assert grads.keys() == grads0.keys()
        for name, grad in grads.items():
            assert torch.equal(grad, grads0[name]), name
        if not layout.storage and len(layout.sizes) == len(layout.mesh.sizes):
            more = {kind: n - counts0[kind] for kind, n in counts.items() if n != counts0[kind]}
            assert more == again(cfg, replace(layout, remat=remat))


@pytest.mark.parametrize("policy", FEW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bit_changes_and_the_plan_counts_what_is_repeated(layout: str, policy: str) -> None:
    check(LLAMA, LAYOUTS[layout], POLICIES[policy])


@pytest.mark.full
@pytest.mark.parametrize("cfg", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS])
def test_no_bit_changes_anywhere(layout: str, policy: str, cfg: GPTConfig) -> None:
    check(cfg, {**LAYOUTS, **MORE_LAYOUTS}[layout], POLICIES[policy])


def test_selective_repeats_no_collective_unless_told_to() -> None:
    layout = LAYOUTS["tp2 sp"]
    kept = replace(layout, remat=Remat(policy="selective", ops=ALL))
    gathered = replace(layout, remat=Remat(policy="selective", ops=(), regather=True))
    assert again(LLAMA, kept) == {}
    # Two all-gathers in each of four layers, for two microbatches.
    assert again(LLAMA, gathered) == {"all_gather": 16}
    full = replace(layout, remat=Remat(policy="full"))
    # Of the last reduce-scatter of a layer nothing is saved without dropout, so it is not repeated.
    assert again(GPT2, full) == {"all_gather": 16, "psum_scatter": 8}


@ranks(2)
def test_processes_recompute_in_a_split_schedule() -> None:
    layout = Layout(Mesh(pp=2), schedule=zero_bubble_h1)
    expected = ran(LLAMA, layout, ProcessComm(layout.mesh))
    cut = replace(layout, remat=POLICIES["full, one by one"])
    loss, grads, _ = ran(LLAMA, cut, ProcessComm(layout.mesh))
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in grads.items())


def test_weights_stay_gathered_or_are_gathered_again() -> None:
    """Under ZeRO-3: seven units' rows, two microbatches; layers of three kinds of recomputation."""
    layout = LAYOUTS["dp2 zero-3"]

    def gathers(remat: Remat) -> int:
        return on_all_ranks(LLAMA, replace(layout, remat=remat))[0][2]["all_gather"]

    stay, twice = gathers(Remat(keep_weights=True)), gathers(Remat())
    assert stay < twice == gathers(Remat(policy="full")) == gathers(Remat(policy="selective"))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_second_run_holds_at_most_two_layers_of_gathered_weights(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at every gather; a group of three that kept its weights would hold three."""
    most: dict[int, int] = {}
    refs: dict[int, list[StorageWeakRef]] = {}
    gather = Weights.gather

    def counted(self: Weights, bucket: Any) -> Callable[[], Tensor]:
        wait = gather(self, bucket)

        def whole() -> Tensor:
            row = wait()
            if bucket[0].startswith("blocks"):
                held = refs.setdefault(id(self), [])
                held.append(StorageWeakRef(row.untyped_storage()))
                alive = sum(not ref.expired() for ref in held)
                most[id(self)] = max(most.get(id(self), 0), alive)
            return row

        return whole

    monkeypatch.setattr(Weights, "gather", counted)
    layout = replace(LAYOUTS["dp2 zero-3"], remat=Remat(policy="full", layers=layers))
    on_all_ranks(replace(LLAMA, num_layers=6), layout)
    program = lower_model(gpt(LLAMA, batch_size=4), layout)
    rows = [g for g in pack(program) if g.unit == "blocks.dense" and g.num_parts("params") > 1]
    assert len(most) == 2
    assert max(most.values()) <= 2 * len(rows)


# -- memory ---------------------------------------------------------------------------------------

WIDE = {"vocab_size": 64, "seq_length": 64, "embed": 32, "head_dim": 8, "ffn": 96}


def held(cfg: GPTConfig, layout: Layout, live: Live) -> list[StagePlan]:
    """Make a step of one microbatch; return the plan's stages after they agreed with it."""
    model = gpt(cfg, batch_size=4, dtype=torch.float64)

    def step(comm: Any = None) -> None:
        bound = train_step(model, layout, adamw(1e-2), comm=comm)
        bound(bound.init(0), [bound.local(b) for b in batches(cfg, 1)])

    if layout.mesh.sizes:
        Threads(layout.mesh.sizes).run(step)
    else:
        step()
    stages = list(plan(model, layout, num_microbatches=1).stages)
    for rank, here in live.here.items():
        stage = stages[rank * layout.num_stage_ranks // layout.mesh.num_ranks]
        assert here == pytest.approx(stage.activation_bytes, rel=0.05)
        assert live.away[rank] == pytest.approx(stage.offloaded_bytes, rel=0.05)
    return stages


@pytest.mark.parametrize("policy", [*FEW, "full, offload"])
def test_storages_alive_at_the_backward_are_those_planned(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(LLAMA, **WIDE)
    (stage,) = held(cfg, Layout(remat=POLICIES[policy]), Live(monkeypatch))
    most = {"full": 0.55, "selective": 0.75, "none": 0.2}[POLICIES[policy].policy]
    if POLICIES[policy].method == "uniform":
        assert stage.activation_bytes < most * stage.plain_bytes


@pytest.mark.full
@pytest.mark.parametrize("cfg", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "zero" not in name])
@pytest.mark.parametrize("policy", POLICIES)
def test_storages_alive_under_every_layout(
    policy: str, layout: str, cfg: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    remat = POLICIES[policy]
    held(replace(cfg, **WIDE), replace(LAYOUTS[layout], remat=remat), Live(monkeypatch))


@pytest.mark.parametrize("policy", FEW)
def test_nothing_is_alive_after_a_step(policy: str) -> None:
    """Without the cycle collector: a saved output that holds its own graph would stay."""
    layout = Layout(remat=POLICIES[policy], schedule=lambda _, m: zero_bubble_h1(1, m))
    model = gpt(LLAMA, batch_size=4, dtype=torch.float64)
    step = train_step(model, layout, adamw(1e-2))
    microbatches = [step.local(b) for b in batches(LLAMA)]
    state, _ = step(step.init(0), microbatches)
    gc.collect()
    gc.disable()
    try:
        with Made() as made:
            step(state, microbatches)
        assert sum(made.alive().values()) == 0
    finally:
        gc.enable()


def test_full_keeps_one_carry_per_group() -> None:
    """Four layers of [4, 64, 32] in float64, alone and in groups of three and one."""
    cfg = replace(LLAMA, **WIDE, dropout=0.0)
    model = gpt(cfg, batch_size=4, dtype=torch.float64)
    carry = 4 * 64 * 32 * 8
    one, three = (
        plan(model, Layout(remat=Remat(policy="full", layers=n))).stages[0] for n in (1, 3)
    )
    assert one.activation_bytes - three.activation_bytes == 2 * carry
    assert three.again_bytes == 3 * (one.again_bytes + carry) - carry


# -- plans ----------------------------------------------------------------------------------------


def test_recomputation_costs_time_and_no_model_flops() -> None:
    cfg = replace(LLAMA, **WIDE)
    model = gpt(cfg, batch_size=4)
    none, full, selective = (
        plan(model, Layout(remat=remat))
        for remat in (Remat(), Remat(policy="full"), Remat(policy="selective"))
    )
    assert none.flops_per_token == full.flops_per_token == selective.flops_per_token
    layers = full.stages[0].again_flops
    attention = selective.stages[0].again_flops
    assert none.stages[0].again_flops == 0 < attention < layers
    assert attention == none.stages[0].attention_flops / 3
    assert full.stages[0].flops == none.stages[0].flops + layers
    assert estimate(none).step_s < estimate(selective).step_s < estimate(full).step_s
    assert "made again" in str(full)
    assert "made again" not in str(none)


# -- compiled -------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # Dynamo's own: it reads .grad of what it wraps, say
@pytest.mark.parametrize("policy", ["full, by three", "selective", "full, offload"])
@pytest.mark.parametrize("schedule", [None, lambda _, m: zero_bubble_h1(1, m)], ids=["1", "zb"])
def test_compiled_programs_recompute(schedule: Any, policy: str) -> None:
    """In pieces, cotangents are added in another order than in one graph: not the same bits."""
    transform = partial(torch.compile, dynamic=False, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    layout = Layout(schedule=schedule)
    remat = POLICIES[policy]
    expected = ran(LLAMA, layout, transform=transform)
    loss, grads, _ = ran(LLAMA, replace(layout, remat=remat), transform=transform)
    exact = remat.policy != "selective"
    torch.testing.assert_close(loss, expected[0], rtol=0 if exact else 1e-13, atol=0)
    for name, grad in grads.items():
        wrong = (grad - expected[1][name]).norm() / expected[1][name].norm()
        assert wrong <= (0 if exact else 1e-13), name


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: Remat(policy="all"),
            "remat: policy='all' is none of none, selective, full.",
        ),
        (
            lambda: Remat(policy="full", layers=0),
            "remat: layers=0. Give 1 or more layers per group.",
        ),
        (
            lambda: Remat(policy="selective", method="block"),
            "remat: method='block', layers=1 say how whole layers are grouped, and policy is "
            "'selective'. Use policy='full' or leave them out.",
        ),
        (
            lambda: Remat(policy="full", regather=True),
            "remat: regather says what single ops keep, and policy is 'full'. Use "
            "policy='selective' or leave it out.",
        ),
        (
            lambda: lower_model(
                gpt(GPT2, batch_size=4), Layout(remat=Remat(policy="selective", ops=("atention",)))
            ),
            "remat: ops ['atention'] are in no layer. Use activation, attention, dropout, norm, "
            "rope, or one of add, attention,",
        ),
    ],
)
def test_contradictions_are_refused(build: Callable[[], Any], text: str) -> None:
    with pytest.raises(ShardingError) as error:
        build()
    assert str(error.value).startswith(text)
