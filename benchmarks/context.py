"""Attention over a cut sequence: bytes that move, memory that is kept, and what steps cost.

Bytes and memory are counted on simulated ranks and must equal the formulas. The time is that of a
rank's ring of tiles, without its messages, against one kernel over the same queries and sources.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import megatree.functional as F
from benchmarks.pairs import interleave, report, spread
from megatree.functional.comm import Single
from megatree.functional.param import Array
from megatree.parallel.context import BLOCKS, AllGather, Ring, Ulysses
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh
from megatree.parallel.order import Zigzag
from megatree.parallel.plan.context import Attention, moved_bytes
from megatree.parallel.threads import ThreadComm, Threads

LOWERINGS = (AllGather(), Ring(), Ulysses())
AXES = ("batch seq kv_heads group head_dim", "batch seq kv_heads head_dim")


class Counted(ThreadComm):
    """A simulated rank that counts the bytes it sends to others."""

    sent = 0

    def exchange_in(
        self, group: list[int], kind: str, axes: Any, send: list[Any], tag: Any = None
    ) -> list[Any]:
        """Count what goes to other ranks of the group, then exchange."""
        for rank, x in zip(group, send, strict=True):
            if x is not None and rank != self.rank:
                self.sent += x.numel() * x.element_size()
        return super().exchange_in(group, kind, axes, send, tag)


def attention_program(work: Attention, layout: Layout) -> Any:
    """Lower one attention for a layout."""
    sizes = {
        "batch": work.batch,
        "seq": work.seq,
        "kv_heads": work.kv_heads,
        "group": work.group,
        "head_dim": work.head_dim,
    }
    q, kv = (Array(axes, torch.float32, grad=True) for axes in AXES)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.attention(q, k, v, causal=work.causal, window=work.window)

    return lower(attention, layout, q, kv, kv, sizes=sizes)


def layout_for(cp: int, how: Any, *, zigzag: bool) -> Layout:
    """Return the layout of cp ranks that share a sequence."""
    order = Zigzag() if zigzag else None
    return Layout(Mesh(cp=cp), Rules(seq="cp", lower={"attention": how}), order=order)


def run(work: Attention, layout: Layout) -> list[tuple[int, int, int]]:
    """Run forward and backward on simulated ranks.

    Returns:
        Per rank the bytes sent in forward and in backward, and the bytes kept between.
    """
    program = attention_program(work, layout)

    def rank_main(comm: ThreadComm) -> tuple[int, int, int]:
        comm.__class__ = Counted
        counted: Any = comm
        inputs = [
            torch.randn(ty.local_shape(layout.sizes)).requires_grad_()
            for ty in program.types.values()
        ]
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            (out,) = program.bind(comm)(*inputs)
        forward = counted.sent
        out.sum().backward()
        return forward, counted.sent - forward, sum(kept.values())

    return Threads(layout.sizes).run(rank_main)


def check_bytes(work: Attention, cp: int, how: Any, *, zigzag: bool) -> tuple[int, int]:
    """Assert that every rank sends what the formula says; return it."""
    expected = moved_bytes(work, cp, how, zigzag=zigzag)
    assert expected is not None
    for rank, (forward, backward, _) in enumerate(run(work, layout_for(cp, how, zigzag=zigzag))):
        # An all-gather's piece goes to every other rank, a reduce-scatter's too: sent is received.
        assert (forward, backward) == expected, (
            f"{how} on cp={cp}, rank {rank}: sent {forward} and {backward}, formula {expected}"
        )
    return expected


def kept_bytes(work: Attention, cp: int, how: Any) -> int:
    """Return the bytes that a rank keeps between forward and backward."""
    kept = {k for _, _, k in run(work, layout_for(cp, how, zigzag=False))}
    assert len(kept) == 1, f"{how} on cp={cp}: ranks keep {kept}"
    return kept.pop()


class LastOf(Single):
    """The last rank of a ring whose pieces are here already: no message, all of the work."""

    # ruff: noqa: D102 (documented in the protocol of functional/comm.py)

    def __init__(self, pieces: list[Tensor]) -> None:
        self.pieces, self.step = pieces, 0

    def axis_size(self, axis: str) -> int:
        return len(self.pieces) if axis == "t" else 1

    def axis_index(self, axis: str) -> int:
        return len(self.pieces) - 1 if axis == "t" else 0

    def ppermute_async(self, x: Tensor, axis: str, shift: int) -> Callable[[], Tensor]:
        if x.dtype != self.pieces[0].dtype or x.shape != self.pieces[0].shape:
            return lambda: x
        self.step += 1
        return lambda: self.pieces[-1 - self.step % len(self.pieces)]


def time_ring(
    n: int, steps: int, heads: int, head_dim: int, dtype: torch.dtype, device: str, pairs: int
) -> dict[str, float]:
    """Time a rank's ring of tiles over one kernel, forward and backward, full mask."""
    shape = (1, n, heads, 1, head_dim)
    q = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    pieces = [
        torch.randn(2, 1, heads, n, head_dim, dtype=dtype, device=device) for _ in range(steps)
    ]
    k, v = (
        torch.cat([p[i] for p in pieces], 1 + 1).transpose(1, 2).contiguous().requires_grad_()
        for i in (0, 1)
    )
    own = [pieces[-1][i].transpose(1, 2).contiguous().requires_grad_() for i in (0, 1)]
    grad = torch.randn_like(q)
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None

    def ring() -> Tensor:
        comm = LastOf([p.contiguous() for p in pieces])
        out = BLOCKS.fn(comm, q, *own, transport="ring", causal=False)
        out.backward(grad)
        synchronise()
        return out

    def one_kernel() -> Tensor:
        out = F.attention(q, k, v, causal=False)
        out.backward(grad)
        synchronise()
        return out

    a, b = ring().double(), one_kernel().double()
    assert (a - b).norm() < 2e-2 * b.norm(), "the two sides do not compute the same"
    timed = interleave(ring, one_kernel, pairs=pairs)
    return {
        **{f"wall_{k}": x for k, x in spread(timed.ratios).items()},
        "cpu_median": spread(timed.cpu_ratios)["median"],
        "ms": 1e3 * sorted(timed.ours)[len(timed.ours) // 2],
    }


def main() -> None:
    """Check bytes and memory, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    work = Attention(batch=2, seq=128, kv_heads=8, group=2, head_dim=16, itemsize=4)
    for cp in (2, 4, 8):
        for how in LOWERINGS:
            for zigzag in (False, True):
                forward, backward = check_bytes(work, cp, how, zigzag=zigzag)
            report("bytes", lowering=str(how), cp=cp, forward=forward, backward=backward)
    for how in LOWERINGS:
        kept = [kept_bytes(work, cp, how) for cp in (1, 2, 4, 8)]
        assert all(2 * b == a for a, b in itertools.pairwise(kept)), f"{how}: {kept}"
        report("kept", lowering=str(how), bytes=kept)
    torch.set_num_threads(1)  # or a small kernel's share of 16 cores is what is measured
    report("ring", device="cpu", **time_ring(512, 4, 8, 64, torch.float32, "cpu", options.pairs))
    if torch.cuda.is_available():
        for n in (8192, 16384):
            found = time_ring(n, 4, 16, 128, torch.bfloat16, "cuda", options.pairs)
            report("ring", device="cuda", n=n, **found)


if __name__ == "__main__":
    main()
