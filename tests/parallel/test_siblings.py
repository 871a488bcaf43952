"""Products of one value: which weights go together, that they lie side by side, and run as one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.codegen import generate
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.packing import pack
from megatree.parallel.program import Program
from megatree.parallel.siblings import (
    Siblings,
    _Beside,
    find_siblings,
    join_siblings,
    side_by_side,
)
from megatree.runtime.optimizers import LeafRule, by_path
from tests.functional.check import rand
from tests.tolerances import distance

LLAMA = GPTConfig(
    vocab_size=64, seq_length=16, num_layers=2, embed=32, kv_heads=2, group=2, head_dim=8, ffn=48
)
GPT2 = replace(
    LLAMA, norm="layer", positions="learned", activation="gelu_tanh", bias=True, tied=True
)
TP = Layout(Mesh(dp=2, tp=2), Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp"))
GATED = replace(LLAMA, bias=True, norm="layer", positions="learned")
GATES = Siblings(("w.w_gate", "w.w_up"))


def sets(cfg: GPTConfig) -> tuple[Siblings, ...]:
    program = lower_model(gpt(cfg, batch_size=4), TP)
    return find_siblings(program.units["blocks.dense"].program.graph)


def test_products_that_meet_in_one_call_go_together() -> None:
    assert sets(LLAMA) == (GATES,)
    heads = Siblings(("w.wq", "w.wk", "w.wv"), ("w.bq", "w.bk", "w.bv"))
    assert sets(GPT2) == (heads, Siblings(("w.w_up",), ("w.b_up",)))
    # With biases and rotary positions, queries and keys are products of their own.
    qwen = sets(replace(LLAMA, qkv_bias=True))
    assert [each.weights for each in qwen] == [("w.wq",), ("w.wk",), ("w.wv",), GATES.weights]


@pytest.mark.parametrize("cfg", [LLAMA, GPT2])
def test_they_lie_side_by_side_unless_they_are_told_apart(cfg: GPTConfig) -> None:
    program = lower_model(gpt(cfg, batch_size=4), TP)
    assert tuple(side_by_side(program, pack(program))["blocks.dense"]) == sets(cfg)
    member = sets(cfg)[0].weights[1].removeprefix("w.")
    apart = pack(program, rule=by_path({f"*.{member}": LeafRule(lr=0.5)}))
    assert tuple(side_by_side(program, apart)["blocks.dense"]) == sets(cfg)[1:]


@pytest.mark.parametrize("cfg", [LLAMA, GPT2, GATED])
def test_a_joined_graph_computes_what_the_program_does(cfg: GPTConfig) -> None:
    program = lower_model(gpt(cfg, batch_size=4, dtype=torch.float64), Layout(Mesh(dp=1), Rules()))
    unit, comm = program.units["blocks.dense"].program, OneDevice()
    joined = join_siblings(unit, find_siblings(unit.graph))
    inputs = [n for n in joined.graph.nodes if n.op == "placeholder"]
    assert len(inputs) == len(unit.types) - {LLAMA: 1, GPT2: 4, GATED: 6}[cfg]
    leaves = _leaves(unit)
    rest = [
        rand(*ty.shape) if ty.dtype.is_floating_point else torch.zeros(ty.shape, dtype=ty.dtype)
        for path, ty in unit.types.items()
        if not path.startswith("w.")
    ]
    results = []
    for graph, first in ((unit.graph, leaves), (joined.graph, joined(leaves))):
        (out,) = generate(graph, comm)(*first, *rest)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        # Together, as that of the keys' bias is zero but for rounding.
        results.append((out.detach(), torch.cat([g.flatten() for g in grads])))
    for mine, theirs in zip(*results, strict=True):
        assert distance(mine, theirs) < 1e-13


def _leaves(unit: Program) -> list[Tensor]:
    """Draw the parameters of a unit; those of siblings are views of one buffer, in their order."""
    paths = [path for path in unit.types if path.startswith("w.")]
    drawn = {path: rand(*unit.types[path].shape, seed=i) for i, path in enumerate(paths)}
    for run in (run for each in find_siblings(unit.graph) for run in each if run):
        parts = torch.cat([drawn[p].flatten() for p in run]).split([drawn[p].numel() for p in run])
        drawn |= {p: part.view(drawn[p].shape) for p, part in zip(run, parts, strict=True)}
    return [drawn[path].detach().requires_grad_() for path in paths]


def test_what_does_not_lie_side_by_side_is_not_taken_for_it() -> None:
    with pytest.raises(AssertionError, match="do not lie side by side"):
        _Beside.apply(*torch.zeros(8).split(2)[::-1])
    with pytest.raises(AssertionError, match="different buffers"):
        _Beside.apply(torch.zeros(2), torch.zeros(2))
