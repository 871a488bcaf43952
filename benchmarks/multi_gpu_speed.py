"""Training runs on n ranks: what the plan says, how fast they are, what communication is hidden."""

import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import write_tokens
from benchmarks.multi_gpu_cases import Cut, health, mixed_cuts
from megatree.models.gpt_config import GPTConfig
from megatree.parallel.plan import DEVICES, Plan, estimate, plan
from megatree.parallel.plan.ceilings import device_of
from megatree.recipes.build import layout_of_run, model_of, moments_of, precision_of
from megatree.recipes.config import CheckpointConfig, DataConfig, RunConfig, TrainConfig
from megatree.recipes.job import Job, open_job
from megatree.recipes.optimizer_config import (
    OptimizerConfig,
    PrecisionConfig,
    RematConfig,
    StorageConfig,
)
from megatree.recipes.presets import llama_1b, llama_7b
from megatree.recipes.profile_config import ProfileConfig
from megatree.runtime.meter import meter
from megatree.runtime.op_kinds import kind_of_kernel, kind_of_op
from megatree.runtime.time_table import TimeTable, read_trace, time_table

MODELS: Mapping[str, GPTConfig] = {
    "llama-1b": llama_1b().model,
    "llama-7b": llama_7b().model,
    "tiny": GPTConfig(
        vocab_size=256,
        seq_length=32,
        num_layers=8,
        embed=64,
        kv_heads=8,
        head_dim=8,
        ffn=128,
        fused_loss=True,
    ),
}
"""Name -> shape; "tiny" is for trying things out."""

SEQUENCES = (8, 4, 2, 1)
"""Sequences of a microbatch for each rank, the first that fits."""

REMATS = (
    RematConfig(),
    RematConfig(policy="selective", ops=("attention", "norm", "activation", "rope")),
    RematConfig(policy="full"),
)
"""What is computed again, if no number of sequences fits without."""

FULL = 0.92
"""Part of a device's memory that a plan may take."""

COLLECTIVES: Mapping[str, str] = {
    "all-gather": "all_?gather",
    "reduce-scatter": "reduce_?scatter",
    "all-reduce": "all_?reduce",
    "all-to-all": "all_?to_?all",
    "send, receive": "send|recv",
}
"""Collective -> what the names of its events hold."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A machine.

    Args:
        card: name of its devices.
        memory: bytes of one; None where no limit is set.
        torch, nccl: versions.
    """

    card: str
    memory: int | None
    torch: str
    nccl: str


def facts(device: torch.device) -> Facts:
    """Return what is known of this rank's device."""
    if device.type != "cuda":
        return Facts(card="cpu", memory=None, torch=torch.__version__, nccl="")
    found = torch.cuda.get_device_properties(device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Facts(card=found.name, memory=found.total_memory, torch=torch.__version__, nccl=nccl)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A run, and what is predicted of it.

    Args:
        cfg: the run; its data are still to come.
        sequences: of a microbatch, for each rank.
        step_s: predicted seconds of a step.
        peak_bytes: predicted memory of the rank that needs most.
        flops_per_token: of the model.
    """

    cfg: RunConfig
    sequences: int
    step_s: float
    peak_bytes: int
    flops_per_token: float

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.cfg.train.global_batch * self.cfg.model.seq_length


def config_of(
    model: GPTConfig, cut: Cut, sequences: int, remat: RematConfig, *, compiled: bool, steps: int
) -> RunConfig:
    """Return a run in bfloat16 with float32 masters: one microbatch, with a pipeline 4 a rank.

    The batch grows with the ranks: each has `sequences` sequences' worth of every microbatch.
    """
    micro = sequences * cut.mesh.dp * cut.mesh.tp
    num = 1 if cut.mesh.pp == 1 else 4 * cut.mesh.pp
    return RunConfig(
        model=model,
        mesh=cut.mesh,
        rules=cut.rules(model),
        pipeline=cut.pipeline,
        storage=StorageConfig(zero=cut.zero),
        remat=remat,
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-4, clip=1.0),
        precision=PrecisionConfig(grads="float32" if num > 1 else "bfloat16"),
        train=TrainConfig(
            steps=steps, global_batch=num * micro, microbatch=micro, log_every=max(1, steps // 4)
        ),
        checkpoint=CheckpointConfig(dir="", every=0),
        dtype="bfloat16",
        compile=compiled,
    )


def plan_of(cfg: RunConfig) -> Plan:
    """Return what `megatree plan` shows of a run."""
    return plan(
        model_of(cfg),
        layout_of_run(cfg),
        num_microbatches=cfg.train.global_batch // cfg.train.microbatch,
        precision=precision_of(cfg),
        moments=moments_of(cfg),
    )


def fit(model: GPTConfig, cut: Cut, machine: Facts, *, compiled: bool, steps: int) -> Chosen | None:
    """Return the run of a layout with as little recomputation and as many sequences as fit; None
    if the plan says that nothing fits.
    """
    for remat in REMATS:
        for sequences in SEQUENCES:
            cfg = config_of(model, cut, sequences, remat, compiled=compiled, steps=steps)
            made = plan_of(cfg)
            if machine.memory is not None and made.peak_bytes > FULL * machine.memory:
                continue
            # The plan's machine is an H100; so is an H200, but for its memory.
            guess = estimate(made, device_of(machine.card) or DEVICES["h100"])
            return Chosen(
                cfg=cfg,
                sequences=sequences,
                step_s=guess.step_s,
                peak_bytes=made.peak_bytes,
                flops_per_token=made.flops_per_token,
            )
    return None


def best_mix(
    model: GPTConfig, n: int, machine: Facts, *, compiled: bool, steps: int
) -> tuple[Cut, Chosen] | None:
    """Return the mix of n ranks that makes most tokens a second by its plan; None if none fits."""
    found = []
    for cut in mixed_cuts(n):
        if cut.mesh.pp * 2 > model.num_layers or cut.mesh.tp > model.kv_heads:
            continue
        if made := fit(model, cut, machine, compiled=compiled, steps=steps):
            found.append((cut, made))
    return max(found, key=lambda one: one[1].tokens / one[1].step_s, default=None)


def shallower(
    model: GPTConfig, cut: Cut, machine: Facts, *, compiled: bool, steps: int
) -> Chosen | None:
    """Return what `fit` does, with half the layers until something fits."""
    while model.num_layers > 1:
        if made := fit(model, cut, machine, compiled=compiled, steps=steps):
            return made
        model = replace(model, num_layers=model.num_layers // 2)
    return None


def with_data(cfg: RunConfig, folder: str, *, steps: int, limit_s: float) -> RunConfig:
    """Return a run of so many steps on random tokens, which are written to a folder."""
    prefix = Path(folder) / "tokens"
    write_tokens(prefix, cfg.model, cfg.train.global_batch * steps)
    return replace(
        cfg,
        data=DataConfig(prefix=(str(prefix),), split="1,0,0"),
        train=replace(cfg.train, steps=steps),
        # On a CPU a step is shorter than a look at it is worth to be late.
        health=health(limit_s, delay=4 if cfg.compile else 0),
    )


def measure(
    device: torch.device, cfg: RunConfig, warmup: int, timed: int, profiled: int, traces: str
) -> dict[str, Any]:
    """Train: steps to warm up, steps to time, and steps to profile; rank 0 returns the results.

    Args:
        device: of this rank.
        cfg: the run.
        warmup, timed, profiled: number of steps; a step more goes before those profiled.
        traces: file of rank 0's trace, without its ending.

    Returns:
        Rates of the timed steps; the most memory of any rank, and "profile" if steps were profiled.
    """
    found: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []

    def report(kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "step":
            found.append(dict(fields))
        if kind == "profile":
            profiles.append(dict(fields))

    clock = time.perf_counter()
    job = open_job(device, cfg, report)
    job = job.train(stop=1)
    first = time.perf_counter() - clock
    job = job.train(stop=warmup)
    found.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    job = job.train(stop=warmup + timed)
    peaks = job.world.gather(_peak_bytes(job))
    out: dict[str, Any] = {"first_step_s": first, "peak_bytes": max(peaks)}
    if found:  # rank 0
        out["step_ms"] = statistics.median(row["ms"] for row in found)
        for key in ("tokens_per_s", "model_flops_per_s", "mfu"):
            rates = [row[key] for row in found]
            out[key] = None if None in rates else statistics.median(rates)
        out["loss"] = found[-1]["loss"]
    if profiled:
        with tempfile.TemporaryDirectory() as folder:
            job.train(profile=ProfileConfig(steps=f"1:{1 + profiled}", dir=folder))
            if profiles:
                out["profile"] = _hidden(profiles[-1], Path(traces), device.type, profiled)
    return out


def _peak_bytes(job: Job) -> int:
    return meter(job.step.program, job.step.comm.device).memory()


def _hidden(profile: Mapping[str, Any], to: Path, device: str, num_steps: int) -> dict[str, Any]:
    """Return the communication of a profile: by collective what lay under other work, what not."""
    file = Path(profile["trace"])
    text = file.read_bytes()
    to.parent.mkdir(parents=True, exist_ok=True)
    packed = to.with_suffix(".json.gz")  # Perfetto opens it as it is
    packed.write_bytes(gzip.compress(text))
    trace = json.loads(text)
    return {
        "trace": str(packed),
        "step_ms": profile["step_ms"],
        "rows": [dict(row) for row in profile["rows"]],
        "collectives": collectives(trace, device, num_steps),
    }


def collectives(trace: Mapping[str, Any], device: str, num_steps: int) -> dict[str, Any]:
    """Return collective -> milliseconds a step that it is exposed, and hidden under other work.

    The time of one is taken with no other communication in the trace, so where two of them run at
    once the sum counts that moment twice; "all" is of all together.
    """
    kind_of = kind_of_kernel if device == "cuda" else kind_of_op

    def only(pattern: str) -> dict[str, float]:
        kept = [
            e
            for e in trace["traceEvents"]
            if e.get("ph") != "X"
            or kind_of(str(e.get("name"))) != "communication"
            or re.search(pattern, e["name"], re.IGNORECASE)
        ]
        events, (start, end) = read_trace({"traceEvents": kept}, device=device)
        return _communication(time_table(events, start=start, end=end, num_steps=num_steps))

    found = {name: only(pattern) for name, pattern in COLLECTIVES.items()}
    return {"all": only(""), **{k: x for k, x in found.items() if any(x.values())}}


def _communication(table: TimeTable) -> dict[str, float]:
    row = next((row for row in table.rows if row.kind == "communication"), None)
    return {
        "exposed_ms": row.ms if row else 0.0,
        "hidden_ms": row.hidden_ms if row else 0.0,
    }
