"""Lowering adds no work: the program of a block executes the ops of local code written by hand."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import megatree.functional as F
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import Axes, RankComm
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model

CFG = GPTConfig(
    vocab_size=32, seq_length=8, num_layers=1, embed=16, kv_heads=4, group=2, head_dim=4, ffn=32
)
TP = Rules(kv_heads="tp", ffn="tp", vocab="tp")


class OneOfTwo(RankComm):
    """Rank 0 of tp=2 without a rank 1: collectives give the right shape, and are counted."""

    def __init__(self) -> None:
        self.sizes, self.coords = {"tp": 2}, {"tp": 0}
        self.device = torch.device("cpu")
        self.calls: Counter[str] = Counter()

    def psum(self, x: Tensor, axes: Axes) -> Tensor:
        self.calls["psum"] += 1
        with _disable_current_modes():
            return x.clone()

    def all_gather(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        self.calls["all_gather"] += 1
        with _disable_current_modes():
            return torch.cat([x, x], dim)

    def psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        self.calls["psum_scatter"] += 1
        with _disable_current_modes():
            return x.chunk(2, dim)[0].clone()


class Ops(TorchDispatchMode):
    """Count the aten ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def collective(forward: Callable | None, backward: Callable | None) -> Callable[[Tensor], Tensor]:
    """Return an autograd function of a collective and its dual, as one writes it by hand."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x) if forward is None else forward(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g if backward is None else backward(g.contiguous())

    return Function.apply


def by_hand(
    comm: OneOfTwo, *, sequence: bool
) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """Write a Llama block for one rank of Megatron's tensor parallelism, with f and g."""
    if sequence:
        enter = collective(
            lambda x: comm.all_gather(x, ("tp",), 1), lambda g: comm.psum_scatter(g, ("tp",), 1)
        )
        leave = collective(
            lambda x: comm.psum_scatter(x, ("tp",), 1), lambda g: comm.all_gather(g, ("tp",), 1)
        )
    else:
        enter = collective(None, lambda g: comm.psum(g, ("tp",)))
        leave = collective(lambda x: comm.psum(x, ("tp",)), None)

    def block(w: dict[str, Tensor], x: Tensor, table: Tensor) -> Tensor:
        y = enter(F.rms_norm(x, w["norm1"]))
        q, k, v = (F.linear(y, w[name]) for name in ("wq", "wk", "wv"))
        o = F.attention(F.rope(q, table), F.rope(k, table), v)
        x = x + leave(torch.matmul(o.flatten(-3), w["wo"].reshape(-1, w["wo"].shape[-1])))
        y = enter(F.rms_norm(x, w["norm2"]))
        gate, up = (torch.nn.functional.linear(y, w[name]) for name in ("w_gate", "w_up"))
        return x + leave(torch.matmul(torch.nn.functional.silu(gate) * up, w["w_down"]))

    return block


def counted(
    comm: OneOfTwo, fn: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> tuple[list[Counter[str]], list[Counter[str]], Tensor]:
    """Run forward and backward; return the ops and the collectives of both, and the result."""
    leaves = {k: v.detach().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    ops, calls = [], []
    with Ops() as mode:
        out = fn(leaves)
    ops, calls = [mode.counts], [Counter(comm.calls)]
    comm.calls.clear()
    seed = torch.ones_like(out)
    with Ops() as mode:
        torch.autograd.grad(out, [x for x in leaves.values() if x.requires_grad], seed)
    comm_calls = Counter(comm.calls)
    comm.calls.clear()
    return [*ops, mode.counts], [*calls, comm_calls], out


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp sp"])
def test_a_block_runs_exactly_the_ops_of_code_written_by_hand(sequence: bool) -> None:
    rules = TP.updated(seq_res="tp") if sequence else TP
    unit = lower_model(gpt(CFG, batch_size=2), Layout(Mesh(tp=2), rules)).units["blocks.dense"]
    types = unit.program.types
    draw = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(ty.local_shape({"tp": 2}), generator=draw).requires_grad_(ty.grad)
        if ty.dtype.is_floating_point
        else torch.zeros(ty.local_shape({"tp": 2}), dtype=ty.dtype)
        for name, ty in types.items()
    }
    comm = OneOfTwo()
    lowered, hand = unit.program.bind(comm), by_hand(comm, sequence=sequence)
    weights = {name: f"w.{name}" for name in unit.leaves}

    def run_lowered(x: dict[str, Tensor]) -> Tensor:
        return lowered(*x.values())[0]

    def run_hand(x: dict[str, Tensor]) -> Tensor:
        w = {name: x[path] for name, path in weights.items()}
        return hand(w, x["carry"], x["consts.rope"])

    theirs, their_calls, expected = counted(comm, run_hand, inputs)
    ours, our_calls, got = counted(comm, run_lowered, inputs)
    assert torch.equal(got, expected)
    assert our_calls == their_calls
    kinds = {"all_gather": 2, "psum_scatter": 2} if sequence else {"psum": 2}
    assert our_calls == [kinds, kinds]
    for phase, mine, by_them in zip(("forward", "backward"), ours, theirs, strict=True):
        assert mine == by_them, f"{phase}: more {mine - by_them}, fewer {by_them - mine}"
    assert sum(ours[0].values()) > 30
    assert sum(ours[1].values()) > 40
