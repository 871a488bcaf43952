"""Training on one GPU through `megatree train`'s own path, beside a hand-written control and
Hugging Face, in one run on one card.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatree.functional import flash_attn_4
from megatree.io.data.indexed import IndexedWriter
from megatree.io.tokenizers import NullTokenizer, TokenizerSpec, tokenizer_facts, write_beside
from megatree.models.gpt import gpt
from megatree.models.gpt_config import GPTConfig
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.recipes.config import CheckpointConfig, DataConfig, RunConfig, TrainConfig
from megatree.recipes.health_config import HealthConfig
from megatree.recipes.job import open_job
from megatree.recipes.optimizer_config import OptimizerConfig, PrecisionConfig
from megatree.recipes.presets import gpt2_345m, llama_1b
from megatree.runtime.meter import PEAKS, meter
from megatree.runtime.processes import local_device

MODELS: Mapping[str, GPTConfig] = {
    "llama-1b": llama_1b().model,
    "llama-1b-gqa": replace(llama_1b().model, kv_heads=4, group=4),
    "gpt-345m": replace(gpt2_345m().model, vocab_size=50304, vocab_pad=1),
    "tiny": GPTConfig(
        vocab_size=256,
        seq_length=32,
        num_layers=2,
        embed=64,
        kv_heads=2,
        head_dim=16,
        ffn=128,
        fused_loss=True,
    ),
}
"""Name -> shape."""

SEQUENCES = {"llama-1b": 8, "llama-1b-gqa": 8, "gpt-345m": 32, "tiny": 4}
"""Name -> sequences of a step."""


def write_tokens(prefix: Path, cfg: GPTConfig, num_samples: int) -> None:
    """Write a corpus of random tokens, as preprocessing would."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(np.uint16)
    with IndexedWriter(prefix, dtype) as writer:
        for _ in range(num_samples + 2):
            tokens = rng.integers(0, cfg.vocab_size, cfg.seq_length + 1, dtype=np.uint16)
            writer.add_document([tokens])
    spec = TokenizerSpec(kind="null", vocab_size=cfg.vocab_size, eod_id=cfg.vocab_size - 1)
    tokenizer = NullTokenizer(vocab_size=cfg.vocab_size, eod=cfg.vocab_size - 1)
    write_beside(prefix, {"tokenizer": tokenizer_facts(tokenizer, spec)})


def config_of(args: argparse.Namespace, prefix: Path, steps: int) -> RunConfig:
    """Return the run: bf16 weights and gradients, float32 masters and moments."""
    sequences = args.sequences or SEQUENCES[args.model]
    several = sequences > args.microbatch
    return RunConfig(
        model=replace(MODELS[args.model], attention_kernel=args.attention),
        data=DataConfig(prefix=(str(prefix),), split="1,0,0"),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-4, clip=None),
        precision=PrecisionConfig(grads="float32" if several else "bfloat16"),
        train=TrainConfig(
            steps=steps,
            global_batch=sequences,
            microbatch=args.microbatch,
            log_every=args.log_every,
        ),
        checkpoint=CheckpointConfig(dir="", every=0),
        health=HealthConfig(delay=4),
        dtype="bfloat16",
        compile=not args.eager,
    )


def megatree(args: argparse.Namespace) -> dict[str, Any]:
    """Train a run of `megatree train`: loader, step and log, as its config has them."""
    sequences = args.sequences or SEQUENCES[args.model]
    steps = args.warmup + args.steps
    device = local_device(0)
    found: list[dict[str, Any]] = []

    def report(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step":
            found.append(dict(fields))

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "tokens"
        write_tokens(prefix, MODELS[args.model], sequences * steps)
        clock = time.perf_counter()
        job = open_job(device, config_of(args, prefix, steps), report)
        opened = time.perf_counter()
        job = job.train(stop=1)
        first = time.perf_counter()
        job = job.train(stop=args.warmup)
        found.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        job = job.train()
    return {
        "open_s": opened - clock,
        "first_step_s": first - opened,
        "step_ms": statistics.median(row["ms"] for row in found),
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in found),
        "model_tflops": statistics.median(row["model_flops_per_s"] for row in found) / 1e12,
        "peak_gib": found[-1]["memory_bytes"] / 2**30,
        "loss": found[-1]["loss"],
    }


def control(args: argparse.Namespace) -> dict[str, Any]:
    """Time the step written by hand."""
    from benchmarks.gpu_control import control_step

    cfg, device = MODELS[args.model], local_device(0)
    if args.attention == "fa4":
        flash_attn_4.register()
    step = control_step(cfg, device, kernel="fa4" if args.attention == "fa4" else "cudnn")
    return _timed(step, _random_steps(args, args.microbatch), args)


def hugging_face(args: argparse.Namespace) -> dict[str, Any]:
    """Time transformers with its layers compiled: float32 weights under bfloat16 autocast."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sdpa: dict[str, Any] = {"attn_implementation": "sdpa", "use_cache": False}
    cfg, device = MODELS[args.model], local_device(0)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    with torch.device(device):
        if cfg.positions == "rotary":
            model: Any = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=cfg.vocab_size, hidden_size=cfg.embed, intermediate_size=cfg.ffn,
                    num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
                    num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, rms_norm_eps=1e-5,
                    max_position_embeddings=cfg.seq_length, tie_word_embeddings=False,
                    **sdpa,
                )
            )  # fmt: skip
            layers = model.model.layers
        else:
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=cfg.vocab_size, n_positions=cfg.seq_length, n_embd=cfg.embed,
                    n_layer=cfg.num_layers, n_head=cfg.num_heads, n_inner=cfg.ffn, resid_pdrop=0.0,
                    embd_pdrop=0.0, attn_pdrop=0.0, **sdpa,
                )
            )  # fmt: skip
            layers = model.transformer.h
    for layer in layers:
        layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(microbatches: list[Tensor]) -> Tensor:
        total = torch.zeros((), device=device)
        for tokens in microbatches:
            with torch.autocast(device.type, torch.bfloat16):
                found = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False)
            loss = found.loss / len(microbatches)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return _timed(step, _random_steps(args, max(1, args.microbatch // 2)), args)


def _random_steps(args: argparse.Namespace, microbatch: int) -> list[list[Tensor]]:
    """Return the microbatches of two steps."""
    cfg, generator = MODELS[args.model], torch.Generator().manual_seed(0)
    sequences = args.sequences or SEQUENCES[args.model]
    shape = sequences, cfg.seq_length + 1
    steps = [torch.randint(0, cfg.vocab_size, shape, generator=generator) for _ in range(2)]
    return [[part.to(local_device(0)) for part in step.split(microbatch)] for step in steps]


def _timed(
    step: Callable[[list[Tensor]], Tensor], data: list[list[Tensor]], args: argparse.Namespace
) -> dict[str, Any]:
    """Time steps of a rival between events of the device, without waiting between them."""
    cfg = MODELS[args.model]
    torch.cuda.synchronize()
    clock = time.perf_counter()
    step(data[0])
    torch.cuda.synchronize()
    first = time.perf_counter() - clock
    for i in range(1, args.warmup):
        step(data[i % 2])
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    marks[0].record()
    for i, mark in enumerate(marks[1:]):
        loss = step(data[i % 2])
        mark.record()
    torch.cuda.synchronize()
    ms = [a.elapsed_time(b) for a, b in pairwise(marks)]
    tokens = sum(t[:, 1:].numel() for t in data[0])
    rate = tokens / statistics.median(ms) * 1e3
    return {
        "first_step_s": first,
        "step_ms": statistics.median(ms),
        "tokens_per_s": rate,
        "model_tflops": rate * flops_per_token(cfg) / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": loss.item(),
    }


def flops_per_token(cfg: GPTConfig) -> float:
    """Return the FLOPs of a token, as megatree's own rows count them."""
    program = lower_model(gpt(cfg, batch_size=1), Layout(Mesh(dp=1), Rules()))
    counted = meter(program, torch.device("cpu"))
    return counted.flops / counted.tokens


ROWS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "control": control,
    "megatree": megatree,
    "hugging-face": hugging_face,
}
"""What is timed; each in a process of its own, so that none has another's memory or caches."""


def _row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in this process."""
    found = ROWS[name](args)
    return {
        "benchmark": "gpu",
        "row": name,
        "model": args.model,
        "attention": args.attention,
        "microbatch": args.microbatch,
        "sequences": args.sequences or SEQUENCES[args.model],
        **found,
        "mfu": found["model_tflops"] * 1e12 / PEAKS["H100"],
        "card": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": args.commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def _in_process(name: str, model: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure one row in a new process; None if it failed, which is told."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--models", model]
    for key in ("steps", "warmup", "microbatch", "sequences", "log_every", "attention", "commit"):
        words += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    words += ["--eager"] * args.eager
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{model} {name}: failed with exit code {done.returncode}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Time rows and models in turns, and print a table and JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama-1b,llama-1b-gqa,gpt-345m")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--only", default="", help="measure one row in this process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--microbatch", type=int, default=0, help="0: the whole step")
    parser.add_argument("--sequences", type=int, default=0, help="of a step; 0: the model's own")
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--attention", default="auto", choices=["auto", "fa4"])
    parser.add_argument("--eager", action="store_true", help="megatree without torch.compile")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", default="", help="append JSON lines to this file")
    args = parser.parse_args()
    args.model = args.models.split(",")[0]
    if args.only:
        args.microbatch = args.microbatch or SEQUENCES[args.model]
        print(json.dumps(_row(args.only, args)))
        return
    print("model         row             ms   tokens/s  TFLOP/s  MFU %   GiB  first s  of control")
    for model in args.models.split(","):
        base = None
        for name in args.rows.split(","):
            found = _in_process(name, model, args)
            if found is None:
                continue
            base = found["tokens_per_s"] if name == "control" else base
            found["of_control"] = None if base is None else found["tokens_per_s"] / base
            ratio = "" if base is None else f"{found['of_control']:.3f}"
            print(
                f"{model:<13} {name:<12} {found['step_ms']:>6.1f} {found['tokens_per_s']:>10,.0f} "
                f"{found['model_tflops']:>8.1f} {found['mfu'] * 100:>6.1f} "
                f"{found['peak_gib']:>5.1f} {found['first_step_s']:>8.1f}  {ratio}",
                flush=True,
            )
            if args.out:
                with Path(args.out).open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
