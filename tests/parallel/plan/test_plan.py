"""Plans against what runs: memory that autograd keeps, executed collectives, known FLOPs."""

import json
import time
from typing import Any

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.plan import plan
from megatree.parallel.schedule import (
    interleaved,
    one_f_one_b,
    timeline,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.parallel.threads import Threads
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step
from tests.parallel.plan.measure import batch, held

TENSOR = {"batch": "dp", "kv_heads": "tp", "ffn": "tp", "vocab": "tp", "seq_res": "tp"}
SMALL = GPTConfig(
    vocab_size=64, seq_length=32, num_layers=4, embed=32, kv_heads=4, head_dim=8, ffn=64
)
LLAMA_1B = GPTConfig(
    vocab_size=32768,
    seq_length=4096,
    num_layers=16,
    embed=2048,
    kv_heads=16,
    head_dim=128,
    ffn=5632,
)


def test_parameters_and_flops_of_llama_1b_are_the_known_ones() -> None:
    """956.4 M parameters; 6 N + 6 L s d FLOPs per token with causal attention counted half."""
    made = plan(gpt(LLAMA_1B, batch_size=8, dtype=torch.bfloat16), Layout())
    assert made.num_params == 956_368_896
    products = made.num_params - 32768 * 2048 - (2 * 16 + 1) * 2048
    expected = 6 * products + 6 * 16 * 4096 * 2048
    assert made.flops_per_token == pytest.approx(expected, rel=1e-12)
    stage = made.stages[0]
    assert stage.parameter_bytes == 2 * made.num_params
    assert stage.gradient_bytes == 4 * made.num_params
    assert stage.optimizer_bytes == 12 * made.num_params  # fp32 master and two moments


@pytest.mark.parametrize("mesh", [{}, {"tp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_planned_memory_is_what_a_step_keeps(mesh: dict[str, int]) -> None:
    """Buffers exactly, and what saved_tensors_hooks sees within 5%."""
    layout = Layout(Mesh(**mesh), Rules(**TENSOR) if mesh else Rules())
    model = gpt(SMALL, batch_size=4)
    made = plan(model, layout).stages[0]
    found = held(model, layout, batch(SMALL, 4))
    assert found.parameters == made.parameter_bytes
    assert found.gradients == made.gradient_bytes
    assert found.optimizer == made.optimizer_bytes
    assert found.saved == pytest.approx(made.activation_bytes, rel=0.05)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_planned_collectives_are_the_executed_ones(sequence_parallel: bool) -> None:
    """Counts of the model's own collectives by kind, over two microbatches."""
    rules: dict[str, Any] = {**TENSOR}
    if not sequence_parallel:
        del rules["seq_res"]
    layout = Layout(Mesh(tp=2), Rules(**rules))
    model = gpt(SMALL, batch_size=4)
    planned: dict[str, int] = {}
    for c in plan(model, layout, num_microbatches=2).collectives:
        if c.phase in ("forward", "backward"):
            planned[c.kind] = planned.get(c.kind, 0) + c.count

    def rank_main(comm):
        step = train_step(model, layout, adamw(1e-3), comm=comm)
        state = step.init(0)
        local = [step.local(batch(SMALL, 4)), step.local(batch(SMALL, 4))]
        before = dict(comm.counts)
        step(state, local)
        syncs = sum(g.num_rows for g in step.groups if g.sync)
        extra = {"psum": syncs + 1}  # gradient syncs and the norm
        return {
            kind: n - before.get(kind, 0) - extra.get(kind, 0) for kind, n in comm.counts.items()
        }

    counts = Threads(layout.mesh.sizes).run(rank_main)[0]
    assert {k: n for k, n in counts.items() if n} == planned


def test_a_plan_for_sixteen_thousand_ranks_takes_seconds() -> None:
    rules = Rules(**TENSOR)
    layout = Layout(Mesh(pp=8, dp=256, tp=8), rules, schedule=one_f_one_b)
    start = time.perf_counter()
    made = plan(gpt(LLAMA_1B, batch_size=256, dtype=torch.bfloat16), layout, num_microbatches=32)
    assert time.perf_counter() - start < 20
    assert made.num_ranks == 16384
    assert len(made.stages) == 8
    assert made.stages[0].live_microbatches == 8
    assert made.stages[7].live_microbatches == 1
    norms = (2 * 16 + 1) * 2048  # whole on each of the 8 tp ranks
    assert sum(s.parameters for s in made.stages) * 8 == made.num_params + 7 * norms


def test_a_plan_of_llama_405b_on_sixty_five_thousand_ranks_takes_seconds() -> None:
    """Its published number of parameters; stages of 7 or 8 of the 126 layers."""
    cfg = GPTConfig(
        vocab_size=128256, seq_length=8192, num_layers=126, embed=16384, kv_heads=8, group=16,
        head_dim=128, ffn=53248, rope_base=5e5,
    )  # fmt: skip
    layout = Layout(Mesh(pp=16, dp=512, tp=8), Rules(**TENSOR), schedule=one_f_one_b)
    start = time.perf_counter()
    made = plan(gpt(cfg, batch_size=512, dtype=torch.bfloat16), layout, num_microbatches=128)
    assert time.perf_counter() - start < 20
    assert made.num_ranks == 65536
    assert made.num_params == 405_853_388_800
    assert made.tokens_per_step == 512 * 128 * 8192
    assert made.bubble == pytest.approx(15 / (128 + 15))


def test_a_plan_is_a_value_that_becomes_json() -> None:
    model = gpt(SMALL, batch_size=4)
    layout = Layout(Mesh(pp=2), schedule=lambda p, m: interleaved(p, m, 2))
    first, second = (plan(model, layout, num_microbatches=4) for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first.as_dict()))["num_ranks"] == 2
    assert first.message_bytes == 4 * 32 * 32 * 4
    assert "pipeline rank 1" in str(first)


@pytest.mark.parametrize("generate", [one_f_one_b, zero_bubble_h1, zero_bubble_v])
def test_live_microbatches_of_a_plan_are_those_of_the_schedule(generate) -> None:
    """A split backward keeps a microbatch until its weight gradients are computed."""
    schedule = generate(2, 6)
    made = plan(gpt(SMALL, batch_size=4), Layout(Mesh(pp=2), schedule=generate), num_microbatches=6)
    per_rank = schedule.num_stages / schedule.num_ranks
    assert [s.live_microbatches for s in made.stages] == [
        live / per_rank for live in timeline(schedule).peak_live
    ]
