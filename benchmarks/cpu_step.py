"""Training steps of the demo's model on CPUs against a Hugging Face Llama of the same shape."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.pairs import Pairs, interleave, report, spread
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.optimizers import adamw
from megatree.runtime.processes import launch
from megatree.runtime.step import TrainStep, train_step

LR, BETAS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0

DEMO = GPTConfig(
    vocab_size=512, seq_length=256, num_layers=4, embed=128, kv_heads=4, head_dim=32, ffn=344
)
"""The shape of the `demo` recipe: 0.92 M parameters."""

LAYOUTS = {
    "1 process": Layout(Mesh(dp=1), Rules()),
    "tp=2, sp": Layout(Mesh(tp=2), Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")),
    "dp=2": Layout(Mesh(dp=2), Rules(batch="dp")),
}


def batch_of(cfg: GPTConfig, batch_size: int) -> dict[str, Tensor]:
    """Draw a batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.vocab_size, (batch_size, cfg.seq_length + 1), generator=generator)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "weights": torch.ones(batch_size, cfg.seq_length),
    }


def our_step(step: TrainStep, batch: dict[str, Tensor]) -> Callable[[], float]:
    """Return a function that makes one update on this rank's part of the batch: the loss."""
    states, local = [step.init()], [step.local(batch)]

    def run() -> float:
        states[0], metrics = step(states[0], local)
        return metrics.loss.item()

    return run


def their_model(cfg: GPTConfig) -> Any:
    """Return a transformers Llama of a shape."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.embed,
            intermediate_size=cfg.ffn,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.kv_heads,
            head_dim=cfg.head_dim,
            max_position_embeddings=cfg.seq_length,
            tie_word_embeddings=cfg.tied,
            use_cache=False,
        )
    )


def their_step(
    cfg: GPTConfig, batch: dict[str, Tensor], rank: int, world: int
) -> Callable[[], float]:
    """Return the same of transformers: AdamW fused, gradients clipped, data-parallel by DDP."""
    model = their_model(cfg)
    model = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    tokens, labels = (batch[name].chunk(world)[rank] for name in ("tokens", "labels"))

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.item()

    return run


def measure(
    device: torch.device | None, cfg: GPTConfig, batch_size: int, layout: Layout, pairs: int
) -> Pairs:
    """Time steps of both on this process, or on this rank of several."""
    world = layout.mesh.num_ranks
    comm = ProcessComm(layout.mesh, device or "cpu") if world > 1 else None
    model = gpt(cfg, batch_size=batch_size)
    optimizer = adamw(LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    step = train_step(model, layout, optimizer, comm=comm, max_norm=MAX_NORM)
    batch = batch_of(cfg, batch_size)
    rank = sum(comm.coords.values()) if comm is not None else 0
    return interleave(our_step(step, batch), their_step(cfg, batch, rank, world), pairs=pairs)


def main() -> None:
    """Run every layout and print tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps per ratio")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = args.batch_size * DEMO.seq_length
    print("layout      threads   tokens/s   theirs      ratio [quartiles]      of CPU time")
    for name in args.layouts:
        job = DEMO, args.batch_size, LAYOUTS[name], args.pairs
        if (world := LAYOUTS[name].mesh.num_ranks) > 1:
            pairs = launch(measure, world, *job, threads=args.threads)
        else:
            pairs = measure(None, *job)
        ours, theirs = (tokens / statistics.median(t) for t in (pairs.ours, pairs.theirs))
        ratio = spread([1 / r for r in pairs.ratios])
        cpu = statistics.median(1 / r for r in pairs.cpu_ratios)
        print(
            f"{name:<11} {args.threads:>7} {ours:>10,.0f} {theirs:>8,.0f}  {ratio['median']:>7.3f} "
            f"[{ratio['low']:.3f}, {ratio['high']:.3f}] {cpu:>13.3f}"
        )
        report(
            "cpu_step", layout=name, threads=args.threads, tokens_per_s=ours,
            baseline_tokens_per_s=theirs, ratio=ratio, cpu_ratio=cpu,
        )  # fmt: skip


if __name__ == "__main__":
    main()
