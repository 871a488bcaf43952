"""What lowering costs: the time of a trace, and a generated block against one written by hand."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F
from benchmarks.pairs import interleave, report, spread
from megatree.functional.chain import Stack
from megatree.functional.param import Array
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import Axes, RankComm
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import trace
from megatree.parallel.mesh import Mesh
from megatree.parallel.program import Program
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.processes import launch

LIMITS = {"trace_ms": 60.0, "eager": 1.02, "compiled": 1.05}
"""Largest trace time, and largest ratios of the generated to the hand-written block's time."""

RULES = Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
TP: Axes = ("tp",)


class LocalComm(RankComm):
    """Rank 0 of 2 without the other: results of the right shape from the rank's own data."""

    sizes: Mapping[str, int] = {"tp": 2}
    coords: Mapping[str, int] = {"tp": 0}

    def psum(self, x: Tensor, axes: Axes) -> Tensor:
        """Double."""
        return x * 2

    def all_gather(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        """Repeat."""
        return torch.cat([x, x], dim)

    def psum_scatter(self, x: Tensor, axes: Axes, dim: int) -> Tensor:
        """Double the first half."""
        return x.chunk(2, dim)[0] * 2


class Gather(torch.autograd.Function):
    """All-gather of the sequence into the tensor-parallel region; reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: RankComm) -> Tensor:
        """Gather."""
        ctx.comm = comm
        return comm.all_gather(x.contiguous(), TP, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Sum and cut the cotangents."""
        return ctx.comm.psum_scatter(grad.contiguous(), TP, 1), None


class Scatter(torch.autograd.Function):
    """Reduce-scatter along the sequence out of the tensor-parallel region; all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: RankComm) -> Tensor:
        """Sum and cut."""
        ctx.comm = comm
        return comm.psum_scatter(x.contiguous(), TP, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Gather the cotangents."""
        return ctx.comm.all_gather(grad.contiguous(), TP, 1), None


def handwritten(cfg: GPTConfig, comm: RankComm) -> Callable[..., tuple[Tensor, ...]]:
    """Return one rank's Llama block as one writes it by hand; arguments as of the generated one."""
    linear = torch.nn.functional.linear
    heads, k = cfg.kv_heads // comm.size(TP), cfg.head_dim

    def block(
        norm1: Tensor, norm2: Tensor, w_down: Tensor, w_gate: Tensor, w_up: Tensor,
        wk: Tensor, wo: Tensor, wq: Tensor, wv: Tensor, x: Tensor, layer: Tensor, table: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        y = Gather.apply(F.rms_norm(x, norm1, eps=cfg.norm_eps), comm)
        b, t, d = y.shape
        query = linear(y, wq.view(-1, d)).view(b, t, heads, cfg.group, k)
        key = linear(y, wk.view(-1, d)).view(b, t, heads, k)
        value = linear(y, wv.view(-1, d)).view(b, t, heads, k)
        o = F.attention(F.rope(query, table), F.rope(key, table), value, causal=True)
        x = x + Scatter.apply(torch.matmul(o.reshape(b, t, -1), wo.view(-1, d)), comm)
        y = Gather.apply(F.rms_norm(x, norm2, eps=cfg.norm_eps), comm)
        hidden = F.swiglu(linear(y, w_gate), linear(y, w_up))
        return (x + Scatter.apply(torch.matmul(hidden, w_down), comm),)

    return block


def trace_block(cfg: GPTConfig, batch_size: int) -> Program:
    """Lower the block of a decoder for two ranks of tensor and sequence parallelism."""
    model = gpt(cfg, batch_size=batch_size)
    stack = model.segments["blocks"]
    assert isinstance(stack, Stack)
    segment = stack.kinds["dense"]

    def block(w: Any, carry: Any, consts: Any) -> Any:
        return segment.apply(w, carry, consts, cfg)

    carry = Array("batch seq_res embed", grad=True)
    consts = {"layer": Array("", torch.int64), "rope": Array("seq head_dim")}
    layout = Layout(Mesh(tp=2), RULES)
    return trace(block, layout, dict(segment.params), carry, consts, sizes=model.sizes).finish()


def inputs_of(program: Program, rank: int = 0) -> list[Tensor]:
    """Draw one rank's arguments; weights as small as a fan-in asks."""
    generator = torch.Generator().manual_seed(rank)
    out = []
    for name, ty in program.types.items():
        shape = ty.local_shape(program.mesh_sizes)
        if not ty.dtype.is_floating_point:
            out.append(torch.zeros(shape, dtype=ty.dtype))
            continue
        scale = 0.05 if name.startswith("w.") and len(shape) > 1 else 1.0
        x = torch.randn(shape, dtype=ty.dtype, generator=generator) * scale
        out.append(x.requires_grad_(ty.grad))
    return out


def forward_backward(
    fn: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """Return a function that runs a block and its backward: the result, then all gradients."""
    learned = [x for x in inputs if x.requires_grad]

    def run() -> list[Tensor]:
        (out,) = fn(*inputs)
        return [out.detach(), *torch.autograd.grad(out, learned, torch.ones_like(out))]

    return run


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest relative L2 distance of two lists of tensors."""
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


def measure_trace(cfg: GPTConfig, batch_size: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Time a warm trace of the block, and binding the program to a comm."""
    program = trace_block(cfg, batch_size)
    bound = [lambda: trace_block(cfg, batch_size), lambda: program.bind(LocalComm())]
    for name, fn in zip(("trace", "bind"), bound, strict=True):
        times, cpu = [], []
        for _ in range(repeats):
            start, cpu_start = time.perf_counter(), time.process_time()
            fn()
            times.append(1e3 * (time.perf_counter() - start))
            cpu.append(1e3 * (time.process_time() - cpu_start))
        yield {"what": name, "ms": statistics.median(times), "cpu_ms": statistics.median(cpu)}


def measure_block(cfg: GPTConfig, batch_size: int, pairs: int, *, compiled: bool) -> dict[str, Any]:
    """Time the generated block against the hand-written one, forward and backward."""
    program, comm = trace_block(cfg, batch_size), LocalComm()
    fns = [program.bind(comm), handwritten(cfg, comm)]
    if compiled:
        fns = [torch.compile(fn, fullgraph=True) for fn in fns]
    inputs = inputs_of(program)
    generated, by_hand = (forward_backward(fn, inputs) for fn in fns)
    apart = distance(generated(), by_hand())
    times = interleave(generated, by_hand, pairs=pairs)
    return {
        "what": "compiled" if compiled else "eager",
        "ms": 1e3 * statistics.median(times.ours),
        "by_hand_ms": 1e3 * statistics.median(times.theirs),
        "ratio": spread(times.ratios),
        "cpu_ratio": spread(times.cpu_ratios),
        "distance": apart,
    }


def compiled_on_rank(
    device: torch.device, cfg: GPTConfig, batch_size: int, backend: str = "inductor"
) -> float:
    """Return how far the compiled program is from the eager one, on this rank of two processes."""
    program = trace_block(cfg, batch_size)
    comm = ProcessComm(Mesh(tp=2), device)
    comm.prepare([TP])
    inputs = inputs_of(program, comm.coords["tp"])
    fn = program.bind(comm)
    eager = forward_backward(fn, inputs)()
    compiled = forward_backward(torch.compile(fn, fullgraph=True, backend=backend), inputs)()
    worst = torch.tensor([distance(compiled, eager)], dtype=torch.float64)
    return comm.pmax(worst, TP).item()


def main() -> None:
    """Run the measurements that were asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="pairs of calls per ratio")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compiled too: needs a C++ compiler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = GPTConfig(
        vocab_size=512, seq_length=256, num_layers=4, embed=128, kv_heads=4, group=2, head_dim=16,
        ffn=344,
    )  # fmt: skip
    for row in measure_trace(cfg, args.batch_size, args.pairs):
        limit = f"at most {LIMITS['trace_ms']:g}" if row["what"] == "trace" else ""
        print(f"{row['what']:<10} {row['ms']:7.2f} ms (CPU {row['cpu_ms']:.2f} ms) {limit}")
        report("lowering", **row)
    for compiled in (False, True) if args.compile else (False,):
        row = measure_block(cfg, args.batch_size, args.pairs, compiled=compiled)
        ratio, cpu = row["ratio"], row["cpu_ratio"]
        print(
            f"{row['what']:<10} {row['ms']:7.2f} ms, by hand {row['by_hand_ms']:.2f} ms: ratio "
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}], CPU time "
            f"{cpu['median']:.3f}; at most {LIMITS[row['what']]:g}"
        )
        report("lowering", **row)
    if args.compile:
        apart = launch(compiled_on_rank, 2, cfg, args.batch_size)
        print(f"gloo       compiled against eager on 2 processes: distance {apart:.2e}")
        report("lowering", what="compiled on 2 processes", distance=apart)


if __name__ == "__main__":
    main()
