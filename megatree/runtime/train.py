"""The training loop: batches by consumed samples, evaluation, checkpoints, going on from one."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatree.io.checkpoint import Saver, latest, load_extra, step_name
from megatree.io.checkpoint.manifest import MANIFEST_FILE
from megatree.io.checkpoint.place import place_of
from megatree.io.data.loader import Loader, Share
from megatree.io.data.stream import Batches
from megatree.io.world import World
from megatree.parallel.model import ModelProgram
from megatree.parallel.order import natural_ranges
from megatree.runtime import pieces
from megatree.runtime.agreement import check_agreement, code_facts, describe, digest, plan_text
from megatree.runtime.batch_ramp import BatchRamp
from megatree.runtime.health import Health, Vitals, check_step, numbers_of
from megatree.runtime.invariants import check_invariant
from megatree.runtime.later import Later
from megatree.runtime.meter import Meter, meter
from megatree.runtime.moment import Moment
from megatree.runtime.recorded import Recorder
from megatree.runtime.signals import StopRequest
from megatree.runtime.step import Metrics, TrainState, TrainStep

Report = Callable[[str, Mapping[str, Any]], None]
"""What rank 0 does with news: a kind ("step", "eval", "saved", "odd", "stopped"), its fields."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Length and rhythm of a run.

    Args:
        steps: step count at which it is over.
        global_batch: samples per step; a ramp makes it a function of the samples consumed.
        microbatch: samples that go through the model at once, over all ranks.
        log_every: steps between reports.
        eval_every: steps between evaluations, beside the one at the end; 0 for that one alone.
        save_every: steps between checkpoints, beside the one at the end; 0 for that one alone.
        directory: folder of the checkpoints, or an fsspec URL; "" saves none.
    """

    steps: int
    global_batch: int | BatchRamp
    microbatch: int
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    directory: str = ""

    def batch(self, consumed: int) -> int:
        """Return the samples of the step that starts after `consumed` ones."""
        ramp = self.global_batch
        return ramp if isinstance(ramp, int) else ramp.batch(consumed)

    def consumed_after(self, consumed: int, num_steps: int) -> int:
        """Return the samples consumed when `num_steps` more steps are made."""
        for _ in range(num_steps):
            consumed += self.batch(consumed)
        return consumed

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this step."""
        return step == self.steps or (every > 0 and step % every == 0)


@dataclass(frozen=True, kw_only=True)
class Care:
    """What a run is looked after with.

    Args:
        health: what is looked at after every step.
        stop: a request to stop, as signals make it; None heeds none.
        recorder: of this rank's calls, to find where a value first was not finite.
        peak_flops: FLOP/s of one device for MFU; None for what is known of it.
        after: called after every step, with the number of steps made since the run began or went
            on; the device may still be at work on it (a profile counts with it).
    """

    health: Health = field(default_factory=Health)
    stop: StopRequest | None = None
    recorder: Recorder | None = None
    peak_flops: float | None = None
    after: Callable[[int], None] = lambda made: None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is.

    Args:
        state: this rank's part of the training state.
        consumed: samples dealt so far.
        vitals: what a checkpoint kept of the steps before (see `Vitals`).
        told: what of the checkpoint was not taken as it is, and why, for the report.
    """

    state: TrainState
    consumed: int = 0
    vitals: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)


def check_start(world: World, config: Any, program: ModelProgram) -> None:
    """Compare what the ranks are about to run; call it before any group of ranks is made.

    Raises:
        ValueError: names the first field that differs, with both values and ranks.
    """
    facts = {f"config.{field}": text for field, text in describe(config).items()}
    facts |= {
        **code_facts(),
        "plan": digest(plan_text(program)),
    }
    check_agreement(world, facts)


def check_data(world: World, data: Mapping[str, Batches]) -> None:
    """Compare what the ranks are about to read.

    Raises:
        ValueError: names the first data that differ, with both digests and ranks.
    """
    check_agreement(world, {f"data.{name}": samples.identity for name, samples in data.items()})


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
    named = place_of(resume)
    chosen = named if named.holds(MANIFEST_FILE) else latest(resume)
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


def begin(
    step: TrainStep,
    path: str,
    *,
    data: Batches,
    world: World,
    weights: str = "",
    skip: Sequence[str] = (),
    masters: Literal["keep", "drop"] = "keep",
) -> Progress:
    """Return the first state of a run, or the one in a checkpoint; every rank calls it.

    Args:
        step: the bound step.
        path: a checkpoint written under any layout; "" starts anew.
        data: the samples to train on.
        world: the processes.
        weights: a checkpoint of other data whose parameters a run that starts anew begins with.
        skip: glob patterns of parameters that are not taken from `weights`.
        masters: what happens to float32 masters of `path` that the run keeps no copies of.

    Raises:
        ValueError: the checkpoint is of another model, or was trained on other samples.
    """
    if not path and weights:
        loaded = pieces.load_weights(weights, step, world, skip=skip)
        return Progress(state=loaded.state, told=_told(loaded))
    if not path:
        return Progress(state=step.init())
    extra = world.broadcast(world.on_first(lambda: load_extra(path)))
    if extra.get("data") != data.identity:
        raise ValueError(
            f"{path}: was trained on other samples (files, split, sequence length, options or "
            f"seed), so {extra.get('consumed')} consumed samples mean nothing here. Use the data "
            "settings of its config.json, or start anew in another folder."
        )
    loaded = pieces.load_state(path, step, world, masters=masters)
    return Progress(
        state=loaded.state,
        consumed=loaded.extra["consumed"],
        vitals=loaded.extra.get("vitals", {}),
        told=_told(loaded),
    )


def _told(loaded: pieces.LoadedState) -> dict[str, Any]:
    told = {"skipped": list(loaded.skipped), "masters": loaded.masters}
    return {key: value for key, value in told.items() if value}


def share_of(step: TrainStep, microbatch: int) -> Share:
    """Return the part of every microbatch that this rank reads: its rows and columns."""
    rows, columns = step.batch_boxes()["tokens"]
    size = step.program.model.sizes["seq"]
    if columns == (0, size):
        return Share(microbatch_size=microbatch, rows=rows)
    if step.program.consts.types["batch.tokens"].permuted:
        # Labels were shifted before, over the whole row: a chunk's last one is in another chunk.
        places = natural_ranges(size, step.program.layout.num_chunks, *columns)
        picked = np.concatenate([np.arange(a, b) for a, b in places])
        return Share(microbatch_size=microbatch, rows=rows, columns=picked)
    return Share(microbatch_size=microbatch, rows=rows, columns=columns)


def on_device(step: TrainStep, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Move what a rank has read to its device; from pinned memory without waiting.

    Raises:
        ValueError: the data and the model do not name the same entries.
    """
    needed = set(step.program.model.batch) - step.program.model.added
    if odd := sorted(needed.symmetric_difference(batch)):
        which = "lacks" if odd[0] in needed else "has"
        raise ValueError(
            f"data: a row {which} {odd[0]!r}: the model reads {', '.join(sorted(needed))}, and the "
            f"data give {', '.join(sorted(batch))}. Choose options of the data that fit the model."
        )
    device = step.gradients.bound.comm.device
    return {name: torch.as_tensor(x).to(device, non_blocking=True) for name, x in batch.items()}


def evaluate(step: TrainStep, data: Batches, *, num_samples: int, microbatch: int) -> float:
    """Return the loss over the first samples of a held-out order; every rank calls it.

    It is the term "loss", without what else a model is trained for; the sum where there is none.
    """
    share = share_of(step, microbatch)
    with Loader(data, batch_size=num_samples, share=share, prefetch=0) as loader:
        batches = [on_device(step, part) for part in next(loader).microbatches]
    terms = step.evaluate(batches)
    return sum(x.item() for x in ([terms["loss"]] if "loss" in terms else terms.values()))


def train(
    step: TrainStep,
    progress: Progress,
    loop: Loop,
    *,
    data: Batches,
    lr: Callable[[int], float],
    world: World,
    valid: Callable[[], float] | None = None,
    extra: Mapping[str, Any] | None = None,
    report: Report = lambda kind, fields: None,
    measure: Callable[[Mapping[str, Tensor]], Mapping[str, Any]] = lambda outs: {},
    care: Care = Care(),
    saver: Saver | None = None,
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
        measure: what a report says of the segments' metrics (`Metrics.outs`).
        care: what the run is looked after with.
        saver: writes the checkpoints, perhaps while training goes on; None waits for each.

    Returns:
        Where the run is now: at `loop.steps`, or before if it was asked to stop.

    Raises:
        ValueError: something is wrong with a step (see `check_step`, `check_invariant`), or a
            checkpoint exists already.
        OSError: a checkpoint cannot be written; with a saver in the background, a step later.
    """
    loader = Loader(
        data,
        batch_size=loop.batch,
        share=share_of(step, loop.microbatch),
        consumed=progress.consumed,
        stop=loop.consumed_after(progress.consumed, loop.steps - progress.state.step),
        pin=step.gradients.bound.comm.device.type == "cuda",
    )
    vitals = Vitals(care.health)
    vitals.restore(progress.vitals)
    measured = meter(step.program, step.comm.device, care.peak_flops)
    tell = report if world.rank == 0 else _say_nothing
    state, consumed = progress.state, progress.consumed
    log = _Log(loop, measured, lr, measure, tell, state.step, consumed)
    stops, held_out = False, math.nan
    delay = 0 if step.waits else care.health.delay

    def make(
        state: TrainState, batches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[TrainState, Metrics]:
        return step(state, batches, ahead=delay > 0, most=vitals.most())

    behind: deque[_Made] = deque()
    told_every = [loop.log_every, loop.save_every if loop.directory else 0]
    told_every += [loop.eval_every] if valid is not None else []
    saver = saver or Saver(world)
    with loader, saver:
        while state.step < loop.steps and not stops:
            batches = [on_device(step, part) for part in next(loader).microbatches]
            if care.recorder is None or state.step == progress.state.step:
                state, metrics = make(state, batches)  # the first one may compile for long
            else:
                state, metrics = care.recorder.alone("step", make, state, batches)
            care.after(state.step - progress.state.step)
            consumed = loader.consumed
            made = _Made(state, metrics, batches, consumed, Moment.now(step.comm.device))
            made = replace(made, tells=any(loop.due(state.step, n) for n in told_every))
            if delay:
                behind.append(_on_its_way(made, step, loop, care))
                left = 0 if _is_due(state.step, loop, care.health) else delay
                asked = _catch_up(behind, left, vitals, step, world, care, log)
                stops = asked and state.step < loop.steps
            else:
                _look(made, vitals, step, world, care, log)
                stops = _asked(step, state, loop, care)
            _tell_saved(saver, tell)
            evaluates = valid is not None and not stops and loop.due(state.step, loop.eval_every)
            saves = bool(loop.directory) and (stops or loop.due(state.step, loop.save_every))
            if saves and not made.tells:  # as it stops
                log.step(made)
            if evaluates and valid is not None:
                clock = time.perf_counter()
                held_out = valid()
                ms = (time.perf_counter() - clock) * 1e3
                tell("eval", {"step": state.step, "valid_loss": held_out, "ms": ms})
                log.restart()
            if saves:
                path = str(place_of(loop.directory) / step_name(state.step))
                told = {"loss": metrics.loss.item()}
                facts = {
                    **(extra or {}),
                    "consumed": consumed,
                    "data": data.identity,
                    # every random number is a function of the seed, the step and its place
                    "rng": {"seed": step.seed, "step": state.step},
                    "schedule": {"updates": state.updates, "lr": lr(state.updates)},
                    "metrics": {**told, "valid_loss": held_out} if evaluates else told,
                }
                if kept := vitals.to_json():
                    facts["vitals"] = kept
                pieces.save(path, step, state, world, extra=facts, saver=saver)
                if stops or state.step == loop.steps:
                    saver.wait()
                _tell_saved(saver, tell)
                log.restart()
            if stops:
                tell("stopped", {"step": state.step, "saved": saves})
    state.weights.settle()
    return Progress(state=state, consumed=consumed, vitals=vitals.to_json())


@dataclass(frozen=True)
class _Made:
    """A step that was made: the state after it, what it reports and read, when it ends, its numbers
    to come, and whether it is reported.
    """

    state: TrainState
    metrics: Metrics
    batches: Sequence[Mapping[str, Tensor]]
    consumed: int
    end: Moment
    numbers: Later | None = None
    tells: bool = False


def _on_its_way(made: _Made, step: TrainStep, loop: Loop, care: Care) -> _Made:
    """Ask the device for what has to be looked at, and whether a rank was asked to stop."""
    named = numbers_of(made.metrics)
    if made.tells:
        named |= {f"term.{name}": value for name, value in made.metrics.terms.items()}
    if care.stop is not None and made.state.step < loop.steps:
        named["stop"] = care.stop.vote(step.comm)
    return replace(made, numbers=Later(named))


def _is_due(step: int, loop: Loop, health: Health) -> bool:
    """Whether something happens after this step before which all steps are looked at."""
    every = [loop.eval_every, loop.save_every, health.invariant_every]
    return any(loop.due(step, n) for n in every)


def _catch_up(
    behind: "deque[_Made]",
    left: int,
    vitals: Vitals,
    step: TrainStep,
    world: World,
    care: Care,
    log: "_Log",
) -> bool:
    """Look at steps until `left` wait, or at all if one says that the run stops: whether it does.

    The ranks read the same numbers of the same step, so they agree.
    """
    stops = False
    while len(behind) > (0 if stops else left):
        made = behind.popleft()
        assert made.numbers is not None
        read = made.numbers.read()
        _look(made, vitals, step, world, care, log, read=read)
        stops = stops or read.get("stop", 0.0) > 0
    return stops


def _look(
    made: _Made,
    vitals: Vitals,
    step: TrainStep,
    world: World,
    care: Care,
    log: "_Log",
    *,
    read: Mapping[str, float] | None = None,
) -> None:
    """Look at a step that was made, and report it; refuse to go on when something is wrong."""
    state, consumed = made.state, made.consumed
    odd = check_step(
        vitals, step, state, made.metrics, made.batches, world, recorder=care.recorder, read=read
    )
    if odd is not None:
        log.tell("odd", {"step": state.step, "text": odd})
    every = care.health.invariant_every
    if every and state.step % every == 0:
        facts = {"consumed": consumed, "seed": step.seed, "vitals": vitals.to_json()}
        check_invariant(step, state, world, facts=facts)
    if made.tells:
        log.step(made, read)


class _Log:
    """Reports steps, as soon as their numbers are there: rates are those since the last report."""

    def __init__(
        self,
        loop: Loop,
        measured: Meter,
        lr: Callable[[int], float],
        measure: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
        tell: Report,
        step: int,
        consumed: int,
    ) -> None:
        self.loop, self.measured, self.lr, self.measure = loop, measured, lr, measure
        self.tell, self.last, self.consumed = tell, step, consumed
        self.restart()

    def restart(self) -> None:
        """Count time from now on, as something else has been done."""
        self.start = Moment.now(self.measured.device)

    def step(self, made: _Made, read: Mapping[str, float] | None = None) -> None:
        """Report a step; without numbers that have arrived, the device is asked."""
        state = made.state
        numbers = _numbers(state, made.metrics, read)
        found = self.measure(made.metrics.outs)
        seconds = made.end.since(self.start)
        microbatches = (made.consumed - self.consumed) // self.loop.microbatch
        self.tell(
            "step",
            {
                **numbers,
                **found,
                "lr": self.lr(max(0, state.updates - 1)),
                "ms": seconds / (state.step - self.last) * 1e3,
                **self.measured.rates(microbatches, seconds),
                "memory_bytes": self.measured.memory(),
                "consumed": made.consumed,
            },
        )
        self.last, self.consumed, self.start = state.step, made.consumed, made.end


def _asked(step: TrainStep, state: TrainState, loop: Loop, care: Care) -> bool:
    """Whether the run stops after this step, which is not its last, as some rank was asked to."""
    return care.stop is not None and state.step < loop.steps and care.stop.agreed(step.comm)


def _numbers(
    state: TrainState, metrics: Metrics, read: Mapping[str, float] | None
) -> dict[str, Any]:
    """Return what a step reports, as plain numbers."""
    if read is None:
        loss, norm = metrics.loss.item(), metrics.grad_norm.item()
        terms = {name: value.item() for name, value in metrics.terms.items()}
    else:
        loss, norm = read["loss"], read["grad_norm"]
        terms = {name: read[f"term.{name}"] for name in metrics.terms}
    return {
        "step": state.step,
        "loss": loss,
        "terms": terms,
        "grad_norm": norm,
        "skipped": state.skipped,
        "loss_scale": metrics.loss_scale,
    }


def _tell_saved(saver: Saver, tell: Report) -> None:
    """Report the checkpoints that are complete, or raise what kept one from being so."""
    for saved in saver.poll():
        fields = {"step": saved.step, "path": saved.path, "ms": saved.stall_s * 1e3}
        tell("saved", {**fields, "total_ms": saved.total_s * 1e3, "removed": list(saved.removed)})


def _say_nothing(kind: str, fields: Mapping[str, Any]) -> None:
    """Report nothing: rank 0 speaks for all."""
