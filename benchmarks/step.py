"""The step around the model: optimizer bandwidth, overlap of gradient sums, and a DDP step by hand.

Three measurements, each against a bound of the same run: AdamW against copies of as many bytes,
gradient sums under the backward against the same sums alone, and whole steps against plain torch
modules of the same maths under DistributedDataParallel with fused AdamW and clipping.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cpu_step import BETAS, DEMO, LR, MAX_NORM, WEIGHT_DECAY, batch_of, our_step
from benchmarks.pairs import Pairs, interleave, report, spread
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.storage import Storage
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import GroupRule, adamw
from megatree.runtime.processes import launch
from megatree.runtime.step import train_step

LAYOUTS = {
    "1 process": Layout(),
    "dp=2": Layout(Mesh(dp=2), Rules(batch="dp")),
    "dp=2 zero-1": Layout(Mesh(dp=2), Rules(batch="dp"), storage=Storage(opt="dp")),
}


# -- optimizer ------------------------------------------------------------------------------------


def update_bandwidth(elements: int, repeats: int, device: str) -> tuple[float, float]:
    """Return bytes per second of AdamW (seven passes of float32) and of copies."""
    buffers = {"group": torch.randn(1, elements, device=device)}
    grads = {"group": torch.randn(1, elements, device=device)}
    optimizer = adamw(LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    state, rules = optimizer.init(buffers), {"group": GroupRule()}
    source, target = torch.randn(2, elements, device=device)

    def update() -> None:
        optimizer.update(buffers, grads, state, step=1, groups=rules)

    pairs = interleave(
        _synced(update, device), _synced(lambda: target.copy_(source), device), pairs=repeats
    )
    # Reads parameters, gradients and two moments, writes three of them; a copy reads and writes.
    rate = 7 * 4 * elements / statistics.median(pairs.ours)
    copy = 2 * 4 * elements / statistics.median(pairs.theirs)
    return rate, copy


def _synced(fn: Callable[[], Any], device: str) -> Callable[[], float]:
    def run() -> float:
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        return 0.0

    return run


# -- overlap --------------------------------------------------------------------------------------


def overlap(
    device: torch.device, layout: Layout, batch_size: int, repeats: int
) -> tuple[float, float, float]:
    """Return seconds of a step, of one without gradient sums, and of those sums alone (rank 0)."""
    comm = ProcessComm(layout.mesh, device)
    step = train_step(gpt(DEMO, batch_size=batch_size), layout, adamw(LR), comm=comm)
    batch = [step.local(batch_of(DEMO, batch_size))]
    sums, state = step.gradients.sums, step.init()
    start_sum, seconds = sums._sum, {"with": [], "without": [], "alone": []}

    def timed(name: str, fn: Callable[[], Any]) -> None:
        torch.distributed.barrier()
        begin = time.perf_counter()
        fn()
        seconds[name].append(time.perf_counter() - begin)

    def alone() -> None:
        for group in sums.groups:
            for row in range(group.num_rows):
                start_sum((group.name, row))
        while sums._waits:
            sums._waits.popleft()()

    for _ in range(repeats):
        timed("with", lambda: step.gradients(batch))
        sums._sum = lambda bucket: None  # type: ignore[method-assign]
        timed("without", lambda: step.gradients(batch))
        sums._sum = start_sum  # type: ignore[method-assign]
        timed("alone", alone)
    del state
    first, second, third = (statistics.median(seconds[k]) for k in ("with", "without", "alone"))
    return first, second, third


# -- a step by hand -------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block with rotary attention and SwiGLU, as one writes it in plain torch."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg, d, heads = cfg, cfg.embed, cfg.kv_heads * cfg.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.wqkv = nn.Linear(d, heads * cfg.group + 2 * heads, bias=False)
        self.wo = nn.Linear(heads * cfg.group, d, bias=False)
        self.w_in = nn.Linear(d, 2 * cfg.ffn, bias=False)
        self.w_down = nn.Linear(cfg.ffn, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream after the block."""
        cfg, (b, t, _) = self.cfg, x.shape
        heads = cfg.kv_heads * cfg.group
        qkv = self.wqkv(self.norm1(x)).view(b, t, -1, cfg.head_dim).transpose(1, 2)
        q, k, v = qkv.split([heads, cfg.kv_heads, cfg.kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        gqa = cfg.group > 1
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        x = x + self.wo(o.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.w_in(self.norm2(x)).chunk(2, -1)
        return x + self.w_down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features by their angles."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """The same decoder as `gpt` makes of the configuration."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.embed)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.embed, eps=1e-5)
        self.head = nn.Linear(cfg.embed, cfg.vocab_size, bias=False)
        frequencies = 1e4 ** (-torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        angles = torch.outer(torch.arange(cfg.seq_length), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def step_by_hand(
    cfg: GPTConfig, batch: dict[str, Tensor], rank: int, world: int
) -> Callable[[], float]:
    """Return a function that makes one update with DDP, clipping and fused AdamW: the loss."""
    torch.manual_seed(0)
    model: Any = Decoder(cfg)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    tokens, labels = (batch[name].chunk(world)[rank] for name in ("tokens", "labels"))

    def run() -> float:
        optimizer.zero_grad(set_to_none=world == 1)
        loss = model(tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.item()

    return run


def whole_steps(
    device: torch.device | None, cfg: GPTConfig, batch_size: int, layout: Layout, pairs: int
) -> Pairs:
    """Time whole steps of both on this process, or on this rank of several."""
    world = layout.mesh.num_ranks
    comm = ProcessComm(layout.mesh, device or "cpu") if world > 1 else None
    optimizer = adamw(LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    step = train_step(
        gpt(cfg, batch_size=batch_size), layout, optimizer, comm=comm, max_norm=MAX_NORM
    )
    batch = batch_of(cfg, batch_size)
    rank = sum(comm.coords.values()) if comm is not None else 0
    return interleave(our_step(step, batch), step_by_hand(cfg, batch, rank, world), pairs=pairs)


def main() -> None:
    """Print the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15, help="pairs per ratio")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--elements", type=int, default=1 << 24, help="of the optimizer's buffers")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", choices=["optimizer", "overlap", "steps"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only in (None, "optimizer"):
        rate, copy = update_bandwidth(args.elements, args.pairs, args.device)
        share = rate / copy
        print(f"optimizer   AdamW {rate / 1e9:.1f} GB/s, copies {copy / 1e9:.1f}: {share:.2f}")
        report("step.optimizer", device=args.device, bytes_per_s=rate, copy_bytes_per_s=copy)
    if args.only in (None, "overlap"):
        job = LAYOUTS["dp=2"], args.batch_size, args.pairs
        whole, without, alone = launch(overlap, 2, *job, threads=args.threads)
        hidden = 1 - (whole - without) / alone
        print(
            f"overlap     gradients {1e3 * whole:.1f} ms, without sums {1e3 * without:.1f}, "
            f"sums alone {1e3 * alone:.1f}: {hidden:.0%} hidden"
        )
        report("step.overlap", step_s=whole, without_s=without, alone_s=alone, hidden=hidden)
    for name in LAYOUTS if args.only in (None, "steps") else ():
        job2 = DEMO, args.batch_size, LAYOUTS[name], args.pairs
        if (world := LAYOUTS[name].mesh.num_ranks) > 1:
            pairs = launch(whole_steps, world, *job2, threads=args.threads)
        else:
            pairs = whole_steps(None, *job2)
        ratio = spread(pairs.ratios)
        print(
            f"{name:<11} {1e3 * statistics.median(pairs.ours):.1f} ms, by hand "
            f"{1e3 * statistics.median(pairs.theirs):.1f}: {ratio['median']:.3f} "
            f"[{ratio['low']:.3f}, {ratio['high']:.3f}] of the time"
        )
        report("step.steps", layout=name, threads=args.threads, ratio=ratio)


if __name__ == "__main__":
    main()
