"""A whole training run on one rank: build, agree, go on or begin, train."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatree.functional import flash_attn_4
from megatree.io.checkpoint import Retention, Saver, load_extra
from megatree.io.checkpoint.place import PathLike
from megatree.io.data import Stream
from megatree.io.tokenizers import require_same_identity
from megatree.io.world import World
from megatree.parallel.comm import OneDevice, RankComm
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.recipes import metrics
from megatree.recipes.build import (
    layout_of_run,
    model_of,
    optimizer_of,
    precision_of,
    rules_of,
    schedule_of,
)
from megatree.recipes.care import caring, check_deterministic
from megatree.recipes.config import RunConfig
from megatree.recipes.data import RunData, open_data
from megatree.recipes.expert_load import expert_load
from megatree.recipes.layout_file import layout_to_plain
from megatree.recipes.profile_config import ProfileConfig
from megatree.recipes.profiling import profile_of
from megatree.recipes.saved import CONFIG_FILE, differences, from_plain, to_json, to_plain
from megatree.recipes.writers import writers
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.compiler import check_compiler
from megatree.runtime.processes import background_world, current_world
from megatree.runtime.profile import marked
from megatree.runtime.recorded import RecordedComm, Recorder, recorded_world
from megatree.runtime.step import TrainStep, train_step
from megatree.runtime.train import (
    Loop,
    Progress,
    Report,
    begin,
    check_data,
    check_start,
    evaluate,
    find_checkpoint,
    train,
)

MAY_DIFFER = ("dropout", "attention_dropout", "attention_kernel", "init_std", "vocab_pad")
"""Fields of the model that may change when a run goes on: they change no leaf and no forward."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run bound to this rank.

    Args:
        cfg: the run.
        world: its processes.
        step: the training step, lowered and bound.
        data: samples to train on, and to evaluate on if any.
        progress: where the run begins or goes on.
        resumed: the checkpoint it goes on from, or "".
        report: what rank 0 does with news.
        recorder: notes this rank's calls.
    """

    cfg: RunConfig
    world: World
    step: TrainStep
    data: RunData
    progress: Progress
    resumed: str
    report: Report
    recorder: Recorder

    def valid_loss(self, num_samples: int) -> float:
        """Return the loss over the first held-out samples; every rank calls it."""
        held_out, size = self.data.valid, self.cfg.train.microbatch
        assert held_out is not None, "the config holds nothing out"
        return evaluate(self.step, held_out, num_samples=num_samples, microbatch=size)

    def train(self, *, stop: int | None = None, profile: ProfileConfig | None = None) -> "Job":
        """Train to the end, or to the step `stop`; return the job as it is then.

        Raises:
            ValueError: the steps to profile are not among those that are made.
        """
        cfg, step = self.cfg, self.step
        loop = Loop(
            steps=cfg.train.steps if stop is None else min(stop, cfg.train.steps),
            global_batch=cfg.train.batches,
            microbatch=cfg.train.microbatch,
            log_every=cfg.train.log_every,
            eval_every=cfg.train.eval_every,
            save_every=cfg.checkpoint.every,
            directory=cfg.checkpoint.place,
        )
        valid = partial(self.valid_loss, cfg.train.eval_samples)
        comm, mesh = self.step.comm, self.step.program.layout.mesh
        recording = None
        if profile is not None:
            done = self.progress.state.step
            profile.check(loop.steps - done)
            step = replace(step, optimizer=marked(step.optimizer))
            recording = profile_of(
                profile,
                cfg,
                step.program,
                world=self.world,
                device=comm.device,
                step=done,
                report=self.report,
            )
        with (
            caring(cfg, mesh, self.world, self.recorder, comm.device) as care,
            recording or nullcontext(),
        ):
            progress = train(
                step,
                self.progress,
                loop,
                data=self.data.train,
                lr=schedule_of(cfg),
                measure=partial(expert_load, model=step.program.model),
                world=self.world,
                valid=valid if cfg.train.eval_every else None,
                extra={
                    "config": to_plain(cfg),
                    "samples": self.data.samples,
                    "tokenizer": self.data.vocabulary.identity,
                    "layout": layout_to_plain(cfg),
                },
                report=self.report,
                care=care if recording is None else replace(care, after=recording),
                saver=saver_of(cfg, self.world),
            )
        return replace(self, progress=progress)


def open_job(device: torch.device, cfg: RunConfig, report: Report) -> Job:
    """Build a run on this rank; every rank calls it.

    Args:
        device: of this rank.
        cfg: the run.
        report: called on rank 0.

    Raises:
        ValueError: the config, the data, the checkpoint or the ranks contradict each other.
    """
    recorder = Recorder(device)
    world = recorded_world(current_world(), recorder)
    # Signals end a run that is not yet under way as they end any program.
    early = replace(cfg, health=replace(cfg.health, stop_on=()))
    with caring(early, layout_of_run(cfg).mesh, world, recorder, device):
        return _open_job(device, cfg, report, world, recorder)


def _open_job(
    device: torch.device, cfg: RunConfig, report: Report, world: World, recorder: Recorder
) -> Job:
    if cfg.model.attention_kernel == "fa4":
        flash_attn_4.register()
    if cfg.compile:
        check_compiler(device.type)
    layout, model = layout_of_run(cfg), model_of(cfg)
    program = lower_model(model, layout)
    check_start(world, cfg, program)
    check_deterministic(cfg, program, device)
    path = find_checkpoint(world, cfg.checkpoint.place, cfg.checkpoint.resume)
    weights = "" if path else find_checkpoint(world, "", cfg.checkpoint.weights or "never")
    before = world.broadcast(world.on_first(lambda: _extra(path or weights)))
    data = open_data(cfg, world, samples=_samples(cfg, before if path else {}))
    sides = {"train": data.train, "valid": data.valid}
    check_data(world, {name: side for name, side in sides.items() if side is not None})
    require_same_identity(
        "data", data.vocabulary.identity, before.get("tokenizer"), of=path or weights
    )
    step = train_step(
        model,
        layout,
        optimizer_of(cfg),
        comm=_recorded(rank_comm(layout.mesh, world, device), recorder),
        max_norm=cfg.optimizer.clip,
        max_value=cfg.optimizer.clip_value,
        seed=cfg.train.seed,
        rules=rules_of(cfg, model),
        precision=replace(precision_of(cfg), skip_nonfinite=cfg.health.nonfinite == "skip"),
        transform=partial(torch.compile, dynamic=False) if cfg.compile else _as_it_is,
        graphs=cfg.cuda_graphs,
        program=program,
    )
    source = path or weights
    changed = world.broadcast(world.on_first(lambda: _check_model(source, cfg)))
    progress = begin(
        step,
        path,
        data=data.train,
        world=world,
        weights=weights,
        skip=cfg.checkpoint.skip,
        masters=cfg.checkpoint.masters,
    )
    world.on_first(lambda: _keep_records(cfg, progress.state.step))
    others = world.on_first(lambda: _writers(cfg, progress.state.step))
    job = Job(
        cfg=cfg,
        world=world,
        step=step,
        data=data,
        progress=progress,
        resumed=path,
        report=partial(_record, cfg.checkpoint.dir, [*(others or ()), report]),
        recorder=recorder,
    )
    if world.rank == 0:
        report("start", _describe(job, changed))
    return job


def run(
    device: torch.device, cfg: RunConfig, report: Report, profile: ProfileConfig | None = None
) -> int:
    """Train a config from start or checkpoint to its end; return the step it is at."""
    return open_job(device, cfg, report).train(profile=profile).progress.state.step


def saver_of(cfg: RunConfig, world: World) -> Saver:
    """Return what saves the checkpoints of a run; every rank calls it."""
    said = cfg.checkpoint
    retention = Retention(last=said.keep_last, every=said.keep_every, best=said.keep_best)
    if not said.asynchronous:
        return Saver(world, retention=retention)
    return Saver(background_world(), host_bytes=said.host_mib << 20, retention=retention)


def rank_comm(mesh: Mesh, world: World, device: torch.device) -> RankComm:
    """Return this rank's collectives.

    Raises:
        ValueError: there are not as many processes as ranks.
    """
    if world.size == mesh.num_ranks == 1:
        return OneDevice(device)
    if world.size != mesh.num_ranks:
        raise ValueError(
            f"mesh: {mesh} has {mesh.num_ranks} ranks, and {world.size} processes run. "
            "Start one process per rank, or change mesh.pp, mesh.dp or mesh.tp."
        )
    return ProcessComm(mesh, device)


def saved_config(path: PathLike) -> RunConfig:
    """Return the config in a checkpoint.

    Raises:
        ValueError: it holds none.
    """
    extra = load_extra(path)
    if "config" not in extra:
        raise ValueError(
            f"{path}: holds no config, so `megatree train` did not write it. Load it in Python."
        )
    return from_plain(extra["config"], f"{path}: config")


def check_same_model(path: str, cfg: RunConfig) -> dict[str, Any]:
    """Return the fields that differ from those in a checkpoint, with both values.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    changed = differences(saved_config(path), cfg)
    wrong = {
        field: pair
        for field, pair in changed.items()
        if field.startswith("model.") and field.removeprefix("model.") not in MAY_DIFFER
    }
    if wrong and not cfg.checkpoint.skip:
        pairs = [f"{field} is {old} there and {new} here" for field, (old, new) in wrong.items()]
        raise ValueError(
            f"{path}: a checkpoint of another model: {', '.join(pairs)}. Use the model of the "
            f"{CONFIG_FILE} beside it, or another checkpoint.dir."
        )
    return {field: list(pair) for field, pair in changed.items()}


def _extra(path: str) -> dict[str, Any]:
    """Return what a checkpoint holds beside arrays, nothing if there is none."""
    return load_extra(path) if path else {}


def _samples(cfg: RunConfig, before: Mapping[str, Any]) -> int:
    """Return the number of samples that the order is made for: what the run began with."""
    return cfg.data.samples or before.get("samples") or cfg.train.batches.consumed(cfg.train.steps)


def _check_model(path: str, cfg: RunConfig) -> dict[str, Any]:
    return check_same_model(path, cfg) if path else {}


def _size(samples: Stream | None) -> int:
    return len(samples.dataset) if samples else 0


def _keep_records(cfg: RunConfig, step: int) -> None:
    """Save the config beside the checkpoints, and forget metrics of steps to come."""
    directory = cfg.checkpoint.dir
    if directory:
        metrics.replace_text(Path(directory) / CONFIG_FILE, to_json(cfg))
        metrics.keep_up_to(directory, step)


def _record(directory: str, reports: Sequence[Report], kind: str, fields: Any) -> None:
    if directory:
        metrics.append(directory, kind, fields)
    for report in reports:
        report(kind, fields)


def _writers(cfg: RunConfig, step: int) -> list[Report]:
    return [*writers(cfg.log, cfg.checkpoint.dir, run=to_plain(cfg), step=step)]


def _recorded(comm: RankComm, recorder: Recorder) -> RankComm:
    return comm if isinstance(comm, OneDevice) else RecordedComm(comm, recorder)


def _describe(job: Job, changed: dict[str, Any]) -> dict[str, Any]:
    cfg = job.cfg
    return {
        "params": job.step.program.model.num_params,
        "mesh": str(cfg.mesh),
        "ranks": cfg.mesh.num_ranks,
        "device": str(job.step.gradients.bound.comm.device),
        "dtype": cfg.dtype,
        "samples": _size(job.data.train),
        "held_out": _size(job.data.valid),
        "seq": cfg.model.seq_length,
        "tokens_per_step": cfg.train.global_batch * cfg.model.seq_length,
        "step": job.progress.state.step,
        "steps": cfg.train.steps,
        "resumed": job.resumed,
        "weights": "" if job.resumed else cfg.checkpoint.weights,
        "changed": changed,
        **job.progress.told,
        "directory": cfg.checkpoint.dir,
    }


def _as_it_is(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn
