"""Steps that went wrong: losses that spike, values that are not finite, what to do then."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from megatree.io.world import World
from megatree.parallel.loss_scale import DynamicLossScale
from megatree.runtime.gradients import check_weights
from megatree.runtime.recorded import Recorder
from megatree.runtime.step import Metrics, TrainState, TrainStep

_MOST = 8
"""Ranks that a message lists."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """What is looked at after every step.

    Args:
        nonfinite: what happens when the loss or a gradient is not finite: "stop" ends the run,
            "skip" goes on without that update.
        max_skips: how many updates in a row may be skipped before the run ends all the same. With
            a loss scale, whose skips are routine, they count once the scale is as small as it gets.
        spike_factor: a loss above so many times the median of the last ones is a spike; 0 for none.
        spike_window: how many losses the median is of; there is no spike before.
        spike: what happens at a spike: "stop" ends the run before a checkpoint of it is written,
            "skip" goes on without that update, "report" says so.
        delay: how many steps late a step is looked at, so that the host need not wait for the
            device at each. No update is made meanwhile once something is not finite, and all is
            looked at before a report, an evaluation or a checkpoint. 0 where every step is read
            anyway (`TrainStep.waits`).
        invariant_every: steps between comparisons of what ranks hold copies of (see
            `check_invariant`), 0 for none.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = 10
    spike_factor: float = 0.0
    spike_window: int = 32
    spike: Literal["stop", "skip", "report"] = "stop"
    delay: int = 0
    invariant_every: int = 0

    def __post_init__(self) -> None:
        if self.spike == "skip" and self.delay:
            raise ValueError(
                f"health.delay: a look {self.delay} steps late cannot skip the update of a spike. "
                "Set health.delay to 0, or health.spike to 'stop'."
            )


@dataclass
class Vitals:
    """What a run remembers of its steps, the same on all ranks; a checkpoint keeps it.

    Args:
        health: what is looked at.
        losses: the last ones that were finite.
        skips: updates skipped in a row up to now.
    """

    health: Health
    losses: deque[float] = field(default_factory=deque)
    skips: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; nothing where nothing is remembered."""
        out: dict[str, Any] = {}
        if self.health.spike_factor and self.losses:
            out["losses"] = list(self.losses)
        if self.skips:
            out["skips"] = self.skips
        return out

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take what a checkpoint kept."""
        self.losses = deque(kept.get("losses", ()))
        self.skips = int(kept.get("skips", 0))
        self._trim()

    def spike(self, loss: float) -> str | None:
        """Note a finite loss; return what is wrong with it, None if nothing is."""
        told = None
        if self.health.spike_factor and len(self.losses) == self.health.spike_window:
            median = statistics.median(self.losses)
            if loss > self.health.spike_factor * median > 0.0:
                told = (
                    f"the loss {loss:.6g} is {loss / median:.3g} times the median {median:.6g} of "
                    f"the last {len(self.losses)} steps (health.spike_factor "
                    f"{self.health.spike_factor:g})"
                )
        if told is None:  # a spike does not move the median by which the next loss is judged
            self.losses.append(loss)
            self._trim()
        return told

    def most(self) -> float | None:
        """Return the largest loss whose update is made, None for any."""
        full = len(self.losses) == self.health.spike_window
        if self.health.spike != "skip" or not self.health.spike_factor or not full:
            return None
        median = statistics.median(self.losses)
        return self.health.spike_factor * median if median > 0.0 else None

    def _trim(self) -> None:
        while len(self.losses) > self.health.spike_window:
            self.losses.popleft()


def check_step(
    vitals: Vitals,
    step: TrainStep,
    state: TrainState,
    metrics: Metrics,
    batches: Sequence[Mapping[str, Tensor]],
    world: World,
    *,
    recorder: Recorder | None = None,
    read: Mapping[str, float] | None = None,
) -> str | None:
    """Look at a step that was made; every rank calls it.

    Args:
        vitals: what is remembered; changed in place.
        step: the bound step.
        state: after the step.
        metrics: of the step.
        batches: its local microbatches.
        world: the processes.
        recorder: of this rank's calls, to find where a value first was not finite.
        read: the metrics as `numbers_of` names them, if they are on the host already.

    Returns:
        What is odd although the run goes on, None if nothing is.

    Raises:
        ValueError: the run must not go on; names the first bad leaf and rank.
    """
    health = vitals.health
    if read is None:
        loss, norm = metrics.loss.item(), metrics.grad_norm.item()
    else:
        loss, norm = read["loss"], read["grad_norm"]
        check_weights([(name, read[f"weight.{name}"]) for name in metrics.weights], len(batches))
    if math.isfinite(loss) and math.isfinite(norm):
        told = vitals.spike(loss)
        vitals.skips = vitals.skips + 1 if told and metrics.skipped else 0
        if vitals.skips and vitals.skips <= health.max_skips:
            return f"{told}; the update was skipped, {vitals.skips} in a row"
        if told and (health.spike == "stop" or vitals.skips):
            raise ValueError(
                f"step {state.step}: {told}. Go on from an earlier checkpoint with a lower "
                "learning rate or other data, or set health.spike to 'report'."
            )
        return told
    if _is_routine(step, state, loss):
        return None
    vitals.skips += 1
    found = find_nonfinite(step, state, metrics, batches, world, recorder=recorder)
    told = f"the loss is {loss} and the norm of the gradients {norm}: {found}"
    if health.nonfinite == "skip" and metrics.skipped and vitals.skips <= health.max_skips:
        return f"{told}; the update was skipped, {vitals.skips} in a row"
    why = f", {vitals.skips} in a row" if vitals.skips > 1 else ""
    raise ValueError(
        f"step {state.step}: {told}{why}. Lower the learning rate or lengthen its warm-up; the "
        "last checkpoint is whole."
    )


def numbers_of(metrics: Metrics) -> dict[str, Tensor]:
    """Return what `check_step` looks at."""
    weights = {f"weight.{name}": weight for name, weight in metrics.weights.items()}
    return {"loss": metrics.loss, "grad_norm": metrics.grad_norm, **weights}


def _is_routine(step: TrainStep, state: TrainState, loss: float) -> bool:
    """Whether a loss scale was too large, and may still shrink."""
    scaling = step.gradients.precision.loss_scale
    if not isinstance(scaling, DynamicLossScale) or state.scale is None:
        return False
    return math.isfinite(loss) and state.scale.scale > scaling.least


class Bad(NamedTuple):
    """A leaf that is not finite: its place in the order of execution, and what is wrong with it."""

    place: tuple[int, int]
    text: str


def find_nonfinite(
    step: TrainStep,
    state: TrainState,
    metrics: Metrics,
    batches: Sequence[Mapping[str, Tensor]],
    world: World,
    *,
    recorder: Recorder | None = None,
) -> str:
    """Say which leaf is not finite, and on which rank that began; every rank calls it.

    Parameters come first. Are they finite, the gradients of the step are computed again (no update
    was made, so they are the same): the leaf named is the one that the backward reached first, and
    the rank one with a value that was not finite before the ranks met.
    """
    bad = bad_leaves(step, step.gradients.weights.shards())
    if any(everywhere := world.gather(min(bad, default=None))):
        return f"parameter {_named(everywhere, min)}"
    first = None
    keyed = step.with_keys(batches, state.step - 1)
    if recorder is None:
        step.gradients(keyed, scale=metrics.loss_scale)
    else:
        with recorder.inspecting() as found:
            step.gradients(keyed, scale=metrics.loss_scale)
        first = found[0] if found else None
    bad = bad_leaves(step, step.gradients.sums.shards())
    told = world.gather((max(bad, default=None), first))
    gradient = [leaf for leaf, _ in told]
    if not any(gradient):
        return "no leaf is wrong when it is computed again, so the device may be"
    began = [(*call, rank) for rank, (_, call) in enumerate(told) if call is not None]
    where = ""
    if began and world.size > 1:
        serial, call, _ = min(began)
        ranks = [rank for other, _, rank in began if other == serial]
        where = f"; it began on {_ranks(ranks)}, before {call}"
    return f"gradient of {_named(gradient, max)}{where}"


def bad_leaves(step: TrainStep, buffers: Mapping[str, Tensor]) -> list[Bad]:
    """Return the leaves of this rank that are not finite.

    Args:
        step: the bound step.
        buffers: group name -> rows at the finest level of storage.
    """
    number = {(unit, index): number for number, (unit, index, _) in enumerate(step.program.order)}
    order = {path: at for at, path in enumerate(step.program.types)}
    found = []
    for group in step.groups:
        if buffers[group.name].isfinite().all():
            continue
        for leaf, layer, view in group.pieces(buffers[group.name]):
            if (odd := _odd(view)) is not None:
                at = "" if layer is None else f" (layer {layer})"
                place = number[group.unit, layer], order[leaf.path]
                found.append(Bad(place, f"{leaf.path}{at} holds {odd}"))
    return found


def _odd(x: Tensor) -> str | None:
    """Say how many elements are not finite."""
    counts = {"nan": int(x.isnan().sum()), "inf": int(x.isinf().sum())}
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    return f"{' and '.join(parts)} of {x.numel()} values" if parts else None


def _named(everywhere: Sequence[Bad | None], pick: Callable[..., Bad]) -> str:
    bad = [Bad(*leaf) for leaf in everywhere if leaf is not None]
    place = pick(bad).place
    texts = {leaf.text for leaf in bad if leaf.place == place}
    ranks = [r for r, leaf in enumerate(everywhere) if leaf is not None and leaf[0] == place]
    return f"{min(texts)} on {_ranks(ranks)}"


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks[:_MOST])) + (", ..." if len(ranks) > _MOST else "")
    return f"rank{'s' * (len(ranks) > 1)} {names}"
