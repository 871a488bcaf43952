"""The training loop: batches by consumed samples, evaluation, checkpoints, going on from one."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatree.io.checkpoint import latest, load_extra, step_name
from megatree.io.world import World
from megatree.parallel.model import ModelProgram
from megatree.runtime import pieces
from megatree.runtime.agreement import check_agreement, code_version, describe, digest, plan_text
from megatree.runtime.step import Metrics, TrainState, TrainStep

Report = Callable[[str, Mapping[str, Any]], None]
"""What rank 0 does with news: a kind ("step", "eval", "saved") and its fields."""


class Samples(Protocol):
    """Samples in an order that depends on the number consumed only (see `TokenDataset`)."""

    @property
    def seq(self) -> int:
        """Tokens in a row."""
        ...

    @property
    def identity(self) -> str:
        """Digest of all that decides the samples and their order."""
        ...

    def batch(
        self, consumed: int, num_samples: int, *, rows: tuple[int, int] | None = None
    ) -> Mapping[str, Any]:
        """Return rows of the samples that follow the first `consumed` ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Length and rhythm of a run.

    Args:
        steps: step count at which it is over.
        global_batch: samples per step.
        microbatch: samples that go through the model at once, over all ranks.
        log_every: steps between reports.
        eval_every: steps between evaluations, beside the one at the end; 0 for that one alone.
        save_every: steps between checkpoints, beside the one at the end; 0 for that one alone.
        directory: folder of the checkpoints; "" saves none.
    """

    steps: int
    global_batch: int
    microbatch: int
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    directory: str = ""

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this step."""
        return step == self.steps or (every > 0 and step % every == 0)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is.

    Args:
        state: this rank's part of the training state.
        consumed: samples dealt so far.
    """

    state: TrainState
    consumed: int = 0


def check_start(
    world: World, config: Any, program: ModelProgram, data: Mapping[str, Samples]
) -> None:
    """Compare what the ranks are about to run; call it before any group of ranks is made.

    Raises:
        ValueError: names the first field that differs, with both values and ranks.
    """
    facts = {f"config.{field}": text for field, text in describe(config).items()}
    facts |= {f"data.{name}": samples.identity for name, samples in data.items()}
    facts |= {
        "code": f"{code_version()} on torch {torch.__version__}",
        "plan": digest(plan_text(program)),
    }
    check_agreement(world, facts)


def find_checkpoint(world: World, directory: str, resume: str) -> str:
    """Return the checkpoint that a run goes on from, or "" if it starts anew; every rank calls it.

    Args:
        world: the processes.
        directory: folder of the run's checkpoints, or "".
        resume: "auto" for the latest one in it, "never" for none, else the checkpoint itself.

    Raises:
        ValueError: the folder holds checkpoints that the run would have to replace, or `resume`
            is no checkpoint.
    """
    return world.broadcast(world.on_first(lambda: _find_checkpoint(directory, resume)))


def _find_checkpoint(directory: str, resume: str) -> str:
    last = latest(directory) if directory else None
    if resume == "auto":
        return str(last or "")
    if resume == "never":
        if last is not None:
            raise ValueError(
                f"{directory}: holds checkpoints up to {last.name}, and a run that starts anew "
                "would have to replace them. Remove them, save elsewhere, or resume 'auto'."
            )
        return ""
    chosen = Path(resume) if (Path(resume) / "manifest.msgpack").exists() else latest(resume)
    if chosen is None:
        raise ValueError(
            f"{resume}: no checkpoint and no folder of checkpoints. Give one, or resume 'auto'."
        )
    if last is not None and last.name > chosen.name:
        raise ValueError(
            f"{directory}: holds {last.name}, which a run that goes on from {chosen} would have to "
            "replace. Save elsewhere, or remove what is later."
        )
    return str(chosen)


def begin(step: TrainStep, path: str, *, data: Samples, world: World) -> Progress:
    """Return the first state of a run, or the one in a checkpoint; every rank calls it.

    Args:
        step: the bound step.
        path: a checkpoint written under any layout; "" starts anew.
        data: the samples to train on.
        world: the processes.

    Raises:
        ValueError: the checkpoint is of another model, or was trained on other samples.
    """
    if not path:
        return Progress(state=step.init())
    extra = world.broadcast(world.on_first(lambda: load_extra(path)))
    if extra.get("data") != data.identity:
        raise ValueError(
            f"{path}: was trained on other samples (text, tokenizer, sequence length or seed), so "
            f"{extra.get('consumed')} consumed samples mean nothing here. Use the data and seed of "
            "its config.json, or start anew in another folder."
        )
    state, extra = pieces.load(path, step, world)
    return Progress(state=state, consumed=extra["consumed"])


def local_batch(
    step: TrainStep, data: Samples, *, consumed: int, num_samples: int
) -> dict[str, Tensor]:
    """Read this rank's part of a microbatch: its rows and no others."""
    boxes = step.batch_boxes()
    batch = data.batch(consumed, num_samples, rows=boxes["tokens"][0])
    device = step.gradients.bound.comm.device
    return {
        name: torch.as_tensor(array)[
            (slice(None), *(slice(start, stop) for start, stop in boxes[name][1:]))
        ].to(device)
        for name, array in batch.items()
    }


def local_batches(
    step: TrainStep, data: Samples, *, consumed: int, num_samples: int, microbatch: int
) -> list[dict[str, Tensor]]:
    """Read this rank's part of the microbatches that make up the next samples."""
    return [
        local_batch(step, data, consumed=consumed + at, num_samples=microbatch)
        for at in range(0, num_samples, microbatch)
    ]


def evaluate(step: TrainStep, data: Samples, *, num_samples: int, microbatch: int) -> float:
    """Return the loss over the first samples of a held-out order; every rank calls it."""
    batches = local_batches(step, data, consumed=0, num_samples=num_samples, microbatch=microbatch)
    return sum(value.item() for value in step.evaluate(batches).values())


def train(
    step: TrainStep,
    progress: Progress,
    loop: Loop,
    *,
    data: Samples,
    lr: Callable[[int], float],
    world: World,
    valid: Callable[[], float] | None = None,
    extra: Mapping[str, Any] | None = None,
    report: Report = lambda kind, fields: None,
) -> Progress:
    """Train up to `loop.steps`; every rank calls it.

    Law: where a run stops and goes on does not show in its results: a state is a function of the
    first state, the samples and the number of steps (on the same mesh, bit for bit).

    Args:
        step: the bound step.
        progress: where to go on; its buffers are changed in place.
        loop: length and rhythm.
        data: the samples.
        lr: step (the first is 0) -> learning rate, for the report.
        world: the processes.
        valid: computes the held-out loss, on all ranks together; None evaluates never.
        extra: small values to keep in checkpoints.
        report: called on rank 0.

    Returns:
        Where the run is now.

    Raises:
        ValueError: the loss is no number any more, or a checkpoint exists already.
    """
    state, consumed = progress.state, progress.consumed
    logged, clock = state.step, time.perf_counter()
    tell = report if world.rank == 0 else _say_nothing
    while state.step < loop.steps:
        batches = local_batches(
            step, data, consumed=consumed, num_samples=loop.global_batch, microbatch=loop.microbatch
        )
        state, metrics = step(state, batches)
        consumed += loop.global_batch
        evaluates = valid is not None and loop.due(state.step, loop.eval_every)
        saves = bool(loop.directory) and loop.due(state.step, loop.save_every)
        if evaluates or saves or loop.due(state.step, loop.log_every):
            fields = _numbers(state.step, metrics)
            ms = _ms_since(clock) / (state.step - logged)
            speed = {"lr": lr(state.step - 1), "ms": ms}
            speed["tokens_per_s"] = loop.global_batch * data.seq / ms * 1e3
            tell("step", {**fields, **speed, "consumed": consumed})
            logged, clock = state.step, time.perf_counter()
        if evaluates and valid is not None:
            loss = valid()
            tell("eval", {"step": state.step, "valid_loss": loss, "ms": _ms_since(clock)})
            clock = time.perf_counter()
        if saves:
            path = str(Path(loop.directory) / step_name(state.step))
            facts = {**(extra or {}), "consumed": consumed, "data": data.identity}
            pieces.save(path, step, state, world, extra=facts)
            tell("saved", {"step": state.step, "path": path, "ms": _ms_since(clock)})
            clock = time.perf_counter()
    return Progress(state=state, consumed=consumed)


def _numbers(step: int, metrics: Metrics) -> dict[str, Any]:
    """Return the step's loss and gradient norm; refuse to go on when they are no numbers."""
    loss, norm = metrics.loss.item(), metrics.grad_norm.item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(
            f"step {step}: the loss is {loss} and the norm of the gradients {norm}. Lower the "
            "learning rate or lengthen its warm-up; the last checkpoint is whole."
        )
    return {"step": step, "loss": loss, "grad_norm": norm}


def _say_nothing(kind: str, fields: Mapping[str, Any]) -> None:
    """Report nothing: rank 0 speaks for all."""


def _ms_since(clock: float) -> float:
    return (time.perf_counter() - clock) * 1e3
