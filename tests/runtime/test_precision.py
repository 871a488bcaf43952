"""Bytes per parameter of every precision and storage, measured; loss scales; rounding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.loss_scale import DynamicLossScale, StaticLossScale
from megatree.parallel.mesh import Mesh
from megatree.parallel.plan import plan
from megatree.parallel.precision import Precision
from megatree.parallel.storage import Storage
from megatree.parallel.threads import Threads
from megatree.runtime.optimizers import adamw, by_path, muon, sgd, with_ema
from megatree.runtime.optimizers.rules import LeafRule
from megatree.runtime.step import TrainState, TrainStep, train_step
from tests.runtime.test_storage import HYBRID, ZERO, batches, hybrid_mesh

CFG = GPTConfig(
    vocab_size=52, seq_length=8, num_layers=2, embed=16, kv_heads=4, head_dim=4, ffn=24, bias=True
)
FP16 = Precision(grads=torch.float16, main_grads=True, loss_scale=StaticLossScale(scale=256.0))
KINDS = {
    "fp16 / fp16": (torch.float16, FP16, 20, (4, 16)),
    "bf16 / fp32": (torch.bfloat16, Precision(), 18, (6, 12)),
    "fp32 / fp32": (torch.float32, Precision(), 16, (8, 8)),
}


def make(layout: Layout, comm: Any, dtype: torch.dtype, **options: Any) -> TrainStep:
    optimizer = options.pop("optimizer", adamw(1e-2))
    model = gpt(CFG, batch_size=4, dtype=dtype)
    return train_step(model, layout, optimizer, comm=comm, **options)


def held_bytes(step: TrainStep, state: TrainState) -> int:
    """Return the bytes of the distinct storages of everything that lives between steps."""
    tensors = [
        *state.params.values(),
        *step.gradients.sums.stored.values(),
        *step.main_grads.values(),
        *state.master.values(),
        *(buffer for table in state.opt.values() for buffer in table.values()),
    ]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_per_parameter(kind: str, d: int) -> None:
    """Plain data parallelism, ZeRO-1, and ZeRO-3 (all of it over d), to the byte."""
    dtype, precision, plain, (whole, cut) = KINDS[kind]
    expected = {"plain": plain, "zero-1": whole + cut / d, "zero-3": plain / d}
    for name, per_param in expected.items():
        storage = ZERO.get(name, Storage())
        layout = Layout(Mesh(dp=d), Rules(batch="dp"), storage=storage)

        def measure(comm: Any, layout: Layout = layout) -> tuple[int, int]:
            step = make(layout, comm, dtype, precision=precision)
            return held_bytes(step, step.init(0)), step.program.model.num_params

        results = Threads({"dp": d}).run(measure) if d > 1 else [measure(None)]
        model = gpt(CFG, batch_size=4, dtype=dtype)
        planned = plan(model, layout, precision=precision).stages[0]
        for held, params in results:
            assert held == per_param * params, name
            assert held == (
                planned.parameter_bytes + planned.gradient_bytes + planned.optimizer_bytes
            )


def test_a_leaf_that_does_not_divide_is_stored_whole() -> None:
    """A dp of 3 divides no dim of 16 or 52, but those of 24."""
    layout = Layout(Mesh(dp=3), Rules(), storage=ZERO["zero-1"])

    def measure(comm: Any) -> tuple[set[str], set[str]]:
        step = make(layout, comm, torch.float32)
        cut = {g.num_parts("opt") > 1: set() for g in step.groups}
        for group in step.groups:
            cut[group.num_parts("opt") > 1] |= {leaf.path for leaf in group.leaves}
        return cut[True], cut[False]

    cut, whole = Threads({"dp": 3}).run(measure)[0]
    assert {"blocks.dense.w_down", "blocks.dense.w_up"} <= cut
    assert {"embed.table", "blocks.dense.norm1", "blocks.dense.wq"} <= whole


# -- loss scaling ---------------------------------------------------------------------------------


def run(step: TrainStep, steps: int = 6) -> tuple[TrainState, list[Any]]:
    state, seen = step.init(0), []
    for _ in range(steps):
        state, metrics = step(state, [step.local(b) for b in batches()])
        seen.append(metrics)
    return state, seen


def weights_of(step: TrainStep, state: TrainState) -> dict[str, Tensor]:
    """Return the parameters that updates work on, of one rank."""
    out = {}
    for group in step.groups:
        buffer = state.master.get(group.name, state.params[group.name])
        out |= {f"{leaf.path} {layer}": v for leaf, layer, v in group.rows(buffer)}
    return out


def test_a_static_loss_scale_changes_no_bit() -> None:
    """A power of two goes through every product and is divided out before the norm."""
    scaled = Precision(loss_scale=StaticLossScale(scale=2.0**20))
    runs = [run(make(Layout(), None, torch.float32, precision=p)) for p in (Precision(), scaled)]
    for plain, other in zip(*(seen for _, seen in runs), strict=True):
        assert torch.equal(plain.loss, other.loss)
        torch.testing.assert_close(plain.grad_norm, other.grad_norm, rtol=1e-12, atol=0)
    steps = [make(Layout(), None, torch.float32, precision=p) for p in (Precision(), scaled)]
    a, b = (weights_of(step, state) for step, (state, _) in zip(steps, runs, strict=True))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7)


def test_a_step_that_overflows_is_skipped_by_all_ranks_and_halves_the_scale() -> None:
    """2**32 overflows float16 at once; nothing moves until the scale fits."""
    scaling = DynamicLossScale(initial=2.0**32, window=3, hysteresis=1)
    precision = Precision(loss_scale=scaling)
    layout = Layout(Mesh(dp=2), Rules(batch="dp"), storage=ZERO["zero-1"])

    def rank_main(comm: Any) -> Any:
        step = make(layout, comm, torch.float16, precision=precision)
        before = {k: v.clone() for k, v in weights_of_shards(step.init(0)).items()}
        state, seen = run(step, 26)
        return before, weights_of_shards(state), state, seen

    results = Threads({"dp": 2}).run(rank_main)
    skipped = [[m.skipped for m in seen] for _, _, _, seen in results]
    assert skipped[0] == skipped[1]
    first = skipped[0].index(False)
    assert 10 < first < 24
    assert all(skipped[0][:first])
    scales = [m.loss_scale for m in results[0][3]]
    assert scales[:first] == [2.0 ** (32 - n) for n in range(first)]
    assert max(scales[first:]) > scales[first]  # and grows again after good steps
    for before, after, state, seen in results:
        assert state.step == 26
        assert state.updates == 26 - sum(m.skipped for m in seen)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(torch.isfinite(x).all() for x in after.values())


def weights_of_shards(state: TrainState) -> dict[str, Tensor]:
    return state.master


def test_without_a_scale_a_step_that_is_not_finite_changes_nothing() -> None:
    step = make(Layout(), None, torch.float32)
    state = step.init(0)
    state, _ = step(state, [step.local(b) for b in batches()])
    for buffer in state.params.values():
        buffer[0, 0] = float("inf")
    before = {
        name: x.clone()
        for table in ({"p": state.params} | state.opt).values()
        for name, x in table.items()
    }
    state, metrics = step(state, [step.local(b) for b in batches()])
    assert not torch.isfinite(metrics.grad_norm)
    after = {n: x for table in ({"p": state.params} | state.opt).values() for n, x in table.items()}
    for name, x in before.items():
        assert torch.equal(x, after[name]), name


# -- rounding and reduction -----------------------------------------------------------------------


def test_stochastic_rounding_needs_no_master_and_follows_it_closer_than_nearest() -> None:
    """Steps of 1e-4 on weights of bf16 vanish when rounded to nearest."""
    sizes = {}
    for name, precision in {
        "nearest": Precision(master=False),
        "stochastic": Precision(master=False, rounding="stochastic"),
        "master": Precision(),
    }.items():
        step = make(Layout(), None, torch.bfloat16, precision=precision, optimizer=adamw(1e-4))
        first = {k: v.double().clone() for k, v in weights_of(step, step.init(0)).items()}
        state, _ = run(step, 30)
        assert bool(state.master) == (name == "master")
        sizes[name] = {k: v.double() - first[k] for k, v in weights_of(step, state).items()}
    errors = {
        name: sum((sizes[name][k] - moved).norm() ** 2 for k, moved in sizes["master"].items())
        for name in ("nearest", "stochastic")
    }
    assert errors["stochastic"] < errors["nearest"]
    along = sum((sizes["stochastic"][k] * m).sum() for k, m in sizes["master"].items())
    length = sum((m * m).sum() for m in sizes["master"].values())
    assert 0.8 < float(along / length) < 1.2  # unbiased: it moves as far as the master


def test_stochastic_rounding_does_not_depend_on_the_mesh() -> None:
    """One update from the same gradients: the same bits on two ranks, stored whole or cut."""
    precision = Precision(master=False, rounding="stochastic")

    def rounded(layout: Layout, comm: Any) -> dict[str, Tensor]:
        step = make(layout, comm, torch.bfloat16, precision=precision, optimizer=sgd(0.0))
        state = step.init(0)
        shards = state.weights.shards()
        for group in step.groups:
            source = shards[group.name].float() * 1.001
            step._round(group, source, shards[group.name], 0)
        state.weights.publish(shards)
        whole = state.weights.whole()
        return {
            f"{leaf.path} {layer}": view.clone()
            for group in step.groups
            for leaf, layer, view in group.rows(whole[group.name])
        }

    expected = rounded(Layout(), None)
    for storage in (Storage(), ZERO["zero-1"], ZERO["zero-3"]):
        layout = Layout(Mesh(dp=2), Rules(batch="dp"), storage=storage)
        for got in Threads({"dp": 2}).run(lambda comm, layout=layout: rounded(layout, comm)):
            for name, value in expected.items():
                assert torch.equal(got[name], value), name


def test_gradients_may_travel_in_bfloat16() -> None:
    """The sum of four ranks is off by bf16's rounding, and by no more."""
    for storage in (Storage(), ZERO["zero-2"]):
        layout = Layout(Mesh(dp=4), Rules(batch="dp"), storage=storage)
        norms = {}
        for name, reduce in {"float32": None, "bfloat16": torch.bfloat16}.items():

            def norm(comm: Any, layout: Layout = layout, reduce: Any = reduce) -> float:
                step = make(layout, comm, torch.float32, precision=Precision(reduce=reduce))
                return run(step, 1)[1][0].grad_norm.item()

            norms[name] = Threads({"dp": 4}).run(norm)[0]
        assert norms["bfloat16"] != norms["float32"]
        assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=5e-3)


def test_narrow_sums_of_many_microbatches_are_refused() -> None:
    step = make(Layout(), None, torch.bfloat16, precision=Precision(grads=torch.bfloat16))
    state = step.init(0)
    step(state, [step.local(batches()[0])])  # one is exact
    with pytest.raises(ValueError, match="bfloat16 sums of 4 microbatches lose the small terms"):
        step(state, [step.local(b) for b in batches()])
    with pytest.raises(ValueError, match="stochastic rounding is for parameters without a master"):
        Precision(rounding="stochastic")


# -- optimizers over storage ----------------------------------------------------------------------

MATRIX = by_path({f"blocks.dense.{name}": LeafRule(matrix=True) for name in ("w_up", "wq", "wo")})
OPTIMIZERS = {
    "muon": lambda: muon(1e-2, others=adamw(1e-2)),
    "adamw with an average": lambda: with_ema(adamw(1e-2), 0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(
            Mesh(dp=2, tp=2), Rules(batch="dp", kv_heads="tp", ffn="tp"), storage=ZERO["zero-3"]
        ),
        replace(hybrid_mesh(), storage=HYBRID["gradients inside, state everywhere"]),
    ],
    ids=["zero-3 tp", "hybrid"],
)
def test_an_optimizer_of_whole_matrices_equals_one_device(name: str, layout: Layout) -> None:
    """Newton-Schulz needs a matrix whole; storage and tp cut it on either dim."""

    def losses(layout: Layout, comm: Any) -> list[float]:
        optimizer = OPTIMIZERS[name]()
        step = make(layout, comm, torch.float64, optimizer=optimizer, rules=MATRIX)
        return [m.loss.item() for m in run(step, 4)[1]]

    expected = losses(Layout(), None)
    assert len(set(expected)) == 4
    for got in Threads(layout.mesh.sizes).run(lambda comm: losses(layout, comm)):
        assert got == pytest.approx(expected, rel=1e-11)


def test_groups_of_different_rules_have_different_names() -> None:
    """Buffers go by name: two groups of one name would share a buffer."""
    names = ("wq", "wo")
    rules = {
        "blocks.dense.wq": LeafRule(matrix=True),
        "blocks.dense.wo": LeafRule(matrix=True, columns_are_inputs=False),
    }
    step = make(Layout(), None, torch.float32, rules=by_path(rules))
    of = {leaf.path: group.name for group in step.groups for leaf in group.leaves}
    assert len({of[f"blocks.dense.{name}"] for name in names}) == 2
