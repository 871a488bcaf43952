"""A whole training run on one rank: build, agree, go on or begin, train."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatree.io.checkpoint import load_extra
from megatree.io.data import TokenDataset
from megatree.io.world import World
from megatree.parallel.comm import OneDevice, RankComm
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.recipes import metrics
from megatree.recipes.build import layout_of_run, model_of, optimizer_of, schedule_of
from megatree.recipes.config import RunConfig
from megatree.recipes.data import datasets
from megatree.recipes.saved import CONFIG_FILE, differences, from_plain, to_json, to_plain
from megatree.runtime.collectives import ProcessComm
from megatree.runtime.processes import current_world
from megatree.runtime.step import TrainStep, train_step
from megatree.runtime.train import (
    Loop,
    Progress,
    Report,
    begin,
    check_start,
    evaluate,
    find_checkpoint,
    train,
)

MAY_DIFFER = ("dropout", "attention_dropout", "init_std", "vocab_pad")
"""Fields of the model that may change when a run goes on: they change no leaf and no forward."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run bound to this rank.

    Args:
        cfg: the run.
        world: its processes.
        step: the training step, lowered and bound.
        data: samples to train on.
        held_out: samples to evaluate on, if any.
        progress: where the run begins or goes on.
        resumed: the checkpoint it goes on from, or "".
        report: what rank 0 does with news.
    """

    cfg: RunConfig
    world: World
    step: TrainStep
    data: TokenDataset
    held_out: TokenDataset | None
    progress: Progress
    resumed: str
    report: Report

    def valid_loss(self, num_samples: int) -> float:
        """Return the loss over the first held-out samples; every rank calls it."""
        assert self.held_out is not None, "the config holds nothing out"
        size = self.cfg.train.microbatch
        return evaluate(self.step, self.held_out, num_samples=num_samples, microbatch=size)

    def train(self, *, stop: int | None = None) -> "Job":
        """Train to the end, or to the step `stop`; return the job as it is then."""
        cfg = self.cfg
        loop = Loop(
            steps=cfg.train.steps if stop is None else min(stop, cfg.train.steps),
            global_batch=cfg.train.global_batch,
            microbatch=cfg.train.microbatch,
            log_every=cfg.train.log_every,
            eval_every=cfg.train.eval_every,
            save_every=cfg.checkpoint.every,
            directory=cfg.checkpoint.dir,
        )
        valid = partial(self.valid_loss, cfg.train.eval_samples)
        progress = train(
            self.step,
            self.progress,
            loop,
            data=self.data,
            lr=schedule_of(cfg),
            world=self.world,
            valid=valid if cfg.train.eval_every else None,
            extra={"config": to_plain(cfg)},
            report=self.report,
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
    world, layout, model = current_world(), layout_of_run(cfg), model_of(cfg)
    data, held_out = world.agree(lambda: datasets(cfg))
    sides = {"train": data} if held_out is None else {"train": data, "valid": held_out}
    check_start(world, cfg, lower_model(model, layout), sides)
    step = train_step(
        model,
        layout,
        optimizer_of(cfg),
        comm=rank_comm(layout.mesh, world, device),
        max_norm=cfg.optimizer.clip,
        seed=cfg.train.seed,
        transform=partial(torch.compile, dynamic=False) if cfg.compile else _as_it_is,
    )
    path = find_checkpoint(world, cfg.checkpoint.dir, cfg.checkpoint.resume)
    changed = world.broadcast(world.on_first(lambda: check_same_model(path, cfg))) if path else {}
    progress = begin(step, path, data=data, world=world)
    world.on_first(lambda: _keep_records(cfg, progress.state.step))
    job = Job(
        cfg=cfg,
        world=world,
        step=step,
        data=data,
        held_out=held_out,
        progress=progress,
        resumed=path,
        report=partial(_record, cfg.checkpoint.dir, report),
    )
    if world.rank == 0:
        report("start", _describe(job, changed))
    return job


def run(device: torch.device, cfg: RunConfig, report: Report) -> int:
    """Train a config from start or checkpoint to its end; return the step it is at."""
    return open_job(device, cfg, report).train().progress.state.step


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


def saved_config(path: str | Path) -> RunConfig:
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
    if wrong:
        pairs = [f"{field} is {old} there and {new} here" for field, (old, new) in wrong.items()]
        raise ValueError(
            f"{path}: a checkpoint of another model: {', '.join(pairs)}. Use the model of the "
            f"{CONFIG_FILE} beside it, or another checkpoint.dir."
        )
    return {field: list(pair) for field, pair in changed.items()}


def _keep_records(cfg: RunConfig, step: int) -> None:
    """Save the config beside the checkpoints, and forget metrics of steps to come."""
    directory = cfg.checkpoint.dir
    if directory:
        metrics.replace_text(Path(directory) / CONFIG_FILE, to_json(cfg))
        metrics.keep_up_to(directory, step)


def _record(directory: str, report: Report, kind: str, fields: Any) -> None:
    if directory:
        metrics.append(directory, kind, fields)
    report(kind, fields)


def _describe(job: Job, changed: dict[str, Any]) -> dict[str, Any]:
    cfg = job.cfg
    return {
        "params": job.step.program.model.num_params,
        "mesh": str(cfg.mesh),
        "ranks": cfg.mesh.num_ranks,
        "device": str(job.step.gradients.bound.comm.device),
        "dtype": cfg.dtype,
        "samples": len(job.data),
        "held_out": len(job.held_out) if job.held_out else 0,
        "seq": cfg.model.seq_length,
        "tokens_per_step": cfg.train.global_batch * cfg.model.seq_length,
        "step": job.progress.state.step,
        "steps": cfg.train.steps,
        "resumed": job.resumed,
        "changed": changed,
        "directory": cfg.checkpoint.dir,
    }


def _as_it_is(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn
