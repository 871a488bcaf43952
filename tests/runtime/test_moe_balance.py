"""What keeps experts even: the auxiliary loss over three kinds of batch, the bias that no gradient
trains, Sinkhorn's choice, jitter; and the shared expert that is computed meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import megatree.functional as F
from megatree.functional.router import updated_bias
from megatree.models.moe import moe
from megatree.models.moe_config import MoEConfig
from megatree.parallel.comm import Axes
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.plan import plan
from megatree.parallel.schedule import one_f_one_b
from megatree.parallel.simulate import simulate
from megatree.parallel.storage import Storage
from megatree.parallel.threads import ThreadComm, Threads
from megatree.runtime import pieces
from megatree.runtime.gradients import make_gradients
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import TrainState, TrainStep, train_step
from tests.runtime.lowered_once import lowered_once
from tests.runtime.moe_cases import (
    BATCH,
    EXPERTS,
    LAYOUTS,
    MODELS,
    SEQ,
    TP,
    layout_of,
    reference,
)
from tests.runtime.one_device import gradients_on, rank_inputs
from tests.thread_worlds import threaded_worlds

BIASED = replace(MODELS["biased"], balance=None, z_loss=None, top_k=2, groups=None,
                 group_top_k=None)  # fmt: skip
BIAS = "blocks.moe.router_bias"


# -- the auxiliary loss ---------------------------------------------------------------------------


def balance_of(cfg: MoEConfig, layout: Layout, num_microbatches: int) -> tuple[float, Tensor]:
    """Return the term and the router's gradient of one batch of 8 in so many microbatches."""
    ref, _ = reference(cfg)
    size = BATCH // num_microbatches
    parts = [{k: v[i : i + size] for k, v in ref.batches[0].items()} for i in range(0, BATCH, size)]
    model = moe(cfg, batch_size=size, dtype=torch.float64)
    ref = replace(ref, model=model, batches=tuple(parts))
    program = lower_model(model, layout)

    def rank_main(comm: ThreadComm) -> tuple[float, Tensor]:
        params, local = rank_inputs(ref, program, comm)
        terms, grads = gradients_on(program, comm, params, local)
        return terms["balance"].item(), grads["blocks"]["moe"]["router"]

    return Threads(layout.sizes).run(rank_main)[0]


def balanced(over: Any) -> MoEConfig:
    return replace(MODELS["dropless"], z_loss=None, balance_over=over)


@pytest.mark.parametrize("name", ["one rank", "dp2 ep2"])
def test_the_global_balance_is_that_of_the_whole_batch_however_it_is_cut(name: str) -> None:
    """Counts of one microbatch, or of those so far, would make it a function of their number."""
    whole, grad = balance_of(balanced("global"), Layout(), 1)
    assert whole == pytest.approx(balance_of(balanced("microbatch"), Layout(), 1)[0], rel=1e-12)
    value, found = balance_of(balanced("global"), LAYOUTS[name], 2)
    assert value == pytest.approx(whole, rel=1e-12)
    assert (found - grad).norm() < 1e-12 * grad.norm()
    other, _ = balance_of(balanced("microbatch"), LAYOUTS[name], 2)
    assert abs(other / whole - 1) > 1e-4


def test_the_balance_of_sequences_is_the_mean_of_theirs() -> None:
    each, _ = balance_of(balanced("sequence"), Layout(), BATCH)
    for microbatches in (1, 2):
        value, _ = balance_of(balanced("sequence"), LAYOUTS["dp2 ep2"], microbatches)
        assert value == pytest.approx(each, rel=1e-12)


def test_a_global_balance_counts_first_and_only_if_there_are_several_microbatches() -> None:
    """The plan says so: twice the forward's messages to experts."""
    model = moe(balanced("global"), batch_size=BATCH)
    one, two = (plan(model, LAYOUTS["ep2"], num_microbatches=n) for n in (1, 2))
    assert (one.surveys, two.surveys) == (False, True)
    (traffic,) = two.experts
    forward = traffic.layers * (traffic.dispatch + traffic.combine)
    assert two.expert_bytes == 2 * (one.expert_bytes + forward)
    calls = sum(c.count for c in two.collectives if c.kind == "all_to_all_v")
    assert calls == 2 * 2 * (3 * 2 + 3)
    assert two.stages[0].flops * 3 == one.stages[0].flops * 4


# -- the bias that no gradient trains -------------------------------------------------------------

STATES: dict[str, Layout] = {
    "dp2 ep2": LAYOUTS["dp2 ep2"],
    "ep2 etp2": LAYOUTS["ep2 etp2"],
    "over cp": LAYOUTS["over cp"],
    "zero-3": replace(
        LAYOUTS["dp2 ep2"], storage=Storage(params=("dp",), grads=("dp",), opt=("dp",))
    ),
    "pp2 ep2": Layout(
        Mesh(pp=2, ep=2), Rules(batch="ep", experts="ep"), schedule=one_f_one_b
    ),
}  # fmt: skip


def trained(
    cfg: MoEConfig, layout: Layout, comm: ThreadComm | None = None, num_steps: int = 3
) -> tuple[TrainStep, TrainState]:
    """Train on the two microbatches of the reference."""
    ref, _ = reference(cfg)
    step = train_step(ref.model, layout, adamw(1e-2), comm=comm)
    state = step.init(0)
    local = [step.local(batch) for batch in ref.batches]
    for _ in range(num_steps):
        state, _ = step(state, local)
    return step, state


def bias_of(step: TrainStep, state: TrainState) -> dict[int, Tensor]:
    """Return this rank's biases: layer -> [experts]."""
    shards = step.gradients.weights.shards()
    return {
        int(layer or 0): view.clone()
        for group in step.groups
        for leaf, layer, view in group.pieces(shards[group.name])
        if leaf.path == BIAS
    }


@cache
def alone(num_steps: int = 3) -> dict[int, Tensor]:
    return bias_of(*trained(BIASED, Layout(), None, num_steps))


def test_a_bias_moves_by_the_choices_of_the_whole_step() -> None:
    """By hand: the choices of both microbatches, with the weights before the step."""
    ref, _ = reference(BIASED)
    step, _ = trained(BIASED, Layout(), num_steps=0)
    params = step.params(step.init(0))
    counts = torch.zeros(2, EXPERTS)
    for batch in ref.batches:
        counts += ref.model.apply(params, batch)[1]["blocks"]["moe"]["load"]
    for layer, bias in alone(1).items():
        expected = updated_bias(torch.zeros(EXPERTS), counts[layer], rate=1e-2)
        assert torch.equal(bias, expected)
        assert set(bias.unique().tolist()) <= {torch.tensor(x).item() for x in (-0.01, 0.0, 0.01)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("zero-3", "pp2 ep2") else pytest.mark.full)
        for name in STATES
    ],
)
def test_a_bias_is_bit_equal_on_any_mesh(name: str) -> None:
    """Counts of a rank, or of the last microbatch, or added twice, end in another sign."""
    cfg, layout = BIASED, layout_of(STATES[name], BIASED)
    with lowered_once():
        ranks = Threads(layout.mesh.sizes).run(lambda comm: bias_of(*trained(cfg, layout, comm)))
    for found in ranks:
        assert found
        for layer, bias in found.items():
            assert torch.equal(bias, alone()[layer])
            assert bias.abs().max() > 0.005


def test_a_bias_is_no_parameter_of_the_optimizer() -> None:
    step, state = trained(BIASED, Layout(), num_steps=1)
    untrained = [group for group in step.groups if not group.trained]
    assert [leaf.path for group in untrained for leaf in group.leaves] == [BIAS]
    for buffers in state.opt.values():
        assert not set(buffers) & {group.name for group in untrained}
    without = moe(replace(BIASED, bias_rate=None), batch_size=BATCH)
    assert step.program.model.num_params == without.num_params


def test_a_bias_stays_where_a_step_made_no_update_and_in_evaluation() -> None:
    step, state = trained(BIASED, Layout(), num_steps=1)
    before = bias_of(step, state)
    local = [step.local(batch) for batch in reference(BIASED)[0].batches]
    step.evaluate(local)
    after, metrics = step(state, local, most=0.0)  # the loss is above: no update
    assert metrics.skipped
    for now in (bias_of(step, state), bias_of(step, after)):
        assert all(torch.equal(now[layer], before[layer]) for layer in before)
    still = replace(BIASED, bias_rate=0.0)
    assert all(not bias.any() for bias in bias_of(*trained(still, Layout())).values())


def test_a_bias_of_a_narrow_model_is_in_float32() -> None:
    """In bfloat16 steps of 1e-3 would vanish beside a bias of 1."""
    cfg = replace(BIASED, bias_rate=1e-3)
    model = moe(cfg, batch_size=BATCH, dtype=torch.bfloat16)
    step = train_step(model, Layout(), adamw(1e-2))
    state, _ = step(step.init(0), [step.local(reference(cfg)[0].batches[0])])
    for bias in bias_of(step, state).values():
        assert bias.dtype == torch.float32
        assert set(bias.abs().unique().tolist()) <= {0.0, torch.tensor(1e-3).item()}


def test_routing_of_a_narrow_model_is_in_float32() -> None:
    """Logits rounded to bfloat16 would tie, and choose otherwise."""
    model = moe(MODELS["jittered"], batch_size=BATCH, dtype=torch.bfloat16)
    graph = lower_model(model, Layout()).units["blocks.moe"].program.graph
    route = next(node for node in graph.nodes if node.meta.get("op") == "route")
    logits = route.all_input_nodes[0]
    kinds = {x.meta["type"].dtype for x in (logits, *logits.all_input_nodes)}
    kinds |= {ty.dtype for ty in route.meta["type"][:1]}
    assert kinds == {torch.float32}
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("ep2", "ep4"),
        pytest.param("ep2", "tp2", marks=pytest.mark.full),
        pytest.param("dp2 ep2", "one rank", marks=pytest.mark.full),
    ],
)
def test_a_checkpoint_with_experts_and_biases_goes_on_under_another_layout(
    there: str, here: str, tmp_path: Path
) -> None:
    """Weights, moments and biases: the fourth step ends as if the mesh had not changed."""
    layouts = {
        **LAYOUTS,
        "ep4": Layout(Mesh(ep=4), Rules(batch="ep", experts="ep")),
        "tp2": Layout(Mesh(tp=2), Rules(seq_res="tp", expert_ffn="tp", **TP)),
    }
    before, after = (layout_of(layouts[name], BIASED) for name in (there, here))
    path = str(tmp_path / "step_00000003")
    worlds = threaded_worlds(before.mesh.num_ranks)

    def write(comm: ThreadComm) -> None:
        step, state = trained(BIASED, before, comm)
        pieces.save(path, step, state, worlds[comm.rank])

    with lowered_once():
        Threads(before.sizes).run(write)
    others = threaded_worlds(after.mesh.num_ranks)

    def read(comm: ThreadComm) -> tuple[float, dict[int, Tensor]]:
        ref, _ = reference(BIASED)
        step = train_step(ref.model, after, adamw(1e-2), comm=comm)
        state, _ = pieces.load(path, step, others[comm.rank])
        local = [step.local(batch) for batch in ref.batches]
        state, metrics = step(state, local)
        return metrics.loss.item(), bias_of(step, state)

    step, state = trained(BIASED, Layout())
    local = [step.local(batch) for batch in reference(BIASED)[0].batches]
    _, metrics = step(state, local)
    with lowered_once():
        ranks = Threads(after.sizes).run(read)
    for loss, bias in ranks:
        assert loss == pytest.approx(metrics.loss.item(), rel=1e-10)
        assert all(torch.equal(bias[layer], alone(4)[layer]) for layer in bias)


# -- Sinkhorn, jitter ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dp2 ep2", "zigzag ring"])
def test_sinkhorn_is_over_the_tokens_of_all_ranks(name: str) -> None:
    """Evened out over a rank's own tokens, experts would be even nowhere else."""
    logits = torch.randn(4, SEQ, 6, generator=torch.Generator().manual_seed(0)).double()
    whole = F.sinkhorn(logits)
    layout = replace(LAYOUTS[name], rules=Rules(
        **{k: v for k, v in LAYOUTS[name].rules.table if k in ("batch", "seq_moe")}
    ))  # fmt: skip
    got = simulate(
        lambda x: F.sinkhorn(F.stop_gradient(x)), layout, logits, axes=("batch seq_moe choices",)
    )
    torch.testing.assert_close(got.value, whole, rtol=1e-12, atol=0)


def test_jitter_is_of_training_alone_and_another_in_every_microbatch() -> None:
    cfg = replace(MODELS["jittered"], balance=None, z_loss=None, shared_ffn=None,
                  overlap_shared=False)  # fmt: skip
    model = moe(cfg, batch_size=BATCH)
    assert "key" in model.batch
    form = model.for_evaluation()
    assert "key" not in form.batch
    assert form.cfg.jitter is None
    ref, _ = reference(cfg)
    batch = ref.batches[0]
    loads = [
        ref.model.apply(ref.params, {**batch, "key": torch.tensor(key)})[1]["blocks"]["moe"]["load"]
        for key in (1, 1, 2)
    ]
    assert torch.equal(loads[0], loads[1])
    assert not torch.equal(loads[0], loads[2])


def test_evaluation_has_no_auxiliary_loss_and_drops_no_token() -> None:
    """A token that comes later could drop one before: the held-out loss would see the future."""
    cfg = MODELS["jittered"].for_evaluation()
    assert (cfg.balance, cfg.z_loss, cfg.capacity_factor, cfg.pad_to_capacity) == (
        None, None, None, False,
    )  # fmt: skip
    step = train_step(moe(MODELS["capped"], batch_size=BATCH), LAYOUTS["one rank"], adamw(1e-2))
    step.init(0)
    local = [step.local(batch) for batch in reference(MODELS["capped"])[0].batches]
    terms, outs = step.forward(local)
    assert set(terms) == {"loss"}
    assert not outs["blocks.moe.drops"].any()


# -- the shared expert, meanwhile -----------------------------------------------------------------


class _Logged(ThreadComm):
    """A rank that notes when messages to experts leave and are waited for."""

    def __init__(self, world: Threads, rank: int, log: list[str]) -> None:
        super().__init__(world, rank)
        self.log = log

    def _noted(self, wait: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.log.append("leave")

        def arrive() -> Tensor:
            self.log.append("arrive")
            return wait()

        return arrive

    def all_to_all_v_async(
        self, x: Tensor, axes: Axes, send: list[int], recv: list[int]
    ) -> Callable[[], Tensor]:
        return self._noted(super().all_to_all_v_async(x, axes, send, recv))

    def all_to_all_async(
        self, x: Tensor, axes: Axes, split_dim: int, concat_dim: int
    ) -> Callable[[], Tensor]:
        return self._noted(super().all_to_all_async(x, axes, split_dim, concat_dim))


class _Shared(torch.autograd.Function):
    """An activation that notes when it runs, and when its backward does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str]) -> Tensor:
        log.append("shared")
        ctx.log = log
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.log.append("shared")
        return grads[0], None


class _Products(TorchFunctionMode):
    """Marks the products of the shared expert, which alone have weights of so many rows."""

    def __init__(self, log: list[str], rows: int) -> None:
        self.log, self.rows = log, rows

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and out.shape[-1] == self.rows:
            return _Shared.apply(out, self.log)
        return out


@pytest.mark.parametrize("capacity", [None, 0.75])
def test_the_shared_expert_is_computed_while_rows_travel_there_and_back(
    capacity: float | None,
) -> None:
    """In the program's order: messages leave, the shared expert runs, messages are waited for; and
    the same in the backward, where the gradients leave before and arrive after its own.
    """
    cfg = replace(
        MODELS["dropless"], num_layers=1, shared_ffn=24, overlap_shared=True, balance=None,
        z_loss=None, capacity_factor=capacity, pad_to_capacity=capacity is not None,
    )  # fmt: skip
    ref, _ = reference(cfg)
    layout = LAYOUTS["ep2"]
    program = lower_model(ref.model, layout)
    world = Threads(layout.sizes)

    def rank_main(comm: ThreadComm) -> list[str]:
        log: list[str] = []
        logged = _Logged(world, comm.rank, log)
        params, local = rank_inputs(ref, program, logged)
        gradients = make_gradients(program, logged)
        gradients.weights.fill(params)
        with _Products(log, 24):
            gradients(local[:1])
        return log

    for log in world.run(rank_main):
        there = ["leave", "leave", "shared", "shared", "arrive", "arrive"]
        assert log == there * 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"overlap_shared": True}, r"overlap_shared without shared_ffn: there is no shared expert"),
        ({"jitter": 1.0}, r"jitter is 1\.0\. Give a number in \(0, 1\)\."),
        ({"bias_rate": -1.0}, r"bias_rate is -1\.0\. Give 0 or more\."),
        ({"bias_rate": float("nan")}, r"bias_rate is nan\. Give 0 or more\."),
        (
            {"router": "sinkhorn"},
            r"router is 'sinkhorn' with balance 0\.3, and its choice is even by itself\. Leave out",
        ),
        ({"router": "hash"}, r"router is 'hash'\. Use one of top_k, sinkhorn\."),
        (
            {"balance_over": "batch"},
            r"balance_over is 'batch'\. Use one of microbatch, sequence, g",
        ),
    ],
)
def test_ways_to_balance_that_contradict_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(MODELS["dropless"], **fields)
