"""One rank's part of the comparison: a step under a layout against the same step on one device."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.functional.tree import flatten_with_names
from megatree.parallel.layout import cut
from megatree.recipes.build import layout_of_run
from megatree.recipes.care import caring
from megatree.recipes.config import RunConfig
from megatree.recipes.job import open_job
from megatree.runtime.gradients import whole_gradients
from megatree.runtime.processes import current_world
from megatree.runtime.step import TrainState, TrainStep

LIMITS: Mapping[str, float] = {
    "loss": 2e-6,
    "grads": 1e-5,
    "norm": 1e-3,
    "after": 1e-5,
}
"""What is compared -> relative error that it may have, in float32.

Losses are added up in float64, so what is left is rounding of the logits. A leaf's gradient is sums
of some 1e3 terms in another order: off by 1e-6, while one of n terms that is lost or counted twice
is 1/n of it. On a CPU torch adds the squares of a buffer in few float32 lanes, so norms of 1e5
elements are off by 1e-5 to 1e-4 on either side; a leaf counted twice is 1e-2. The loss after the
update takes over what clipping makes of that.
"""

Key = tuple[str, int | None]
"""Path of a leaf, layer."""


@dataclass(frozen=True)
class Taken:
    """What a step came to.

    Args:
        loss, norm: of the step.
        after: the loss of the same tokens after the update.
        grads: before they are clipped: this rank's part of every leaf and layer.
        loads: metric -> tokens that experts took.
    """

    loss: float
    norm: float
    after: float
    grads: Mapping[Key, Tensor]
    loads: Mapping[str, Tensor]


def microbatches(cfg: RunConfig) -> list[dict[str, Tensor]]:
    """Draw the whole microbatches of a step; the parts of tokens that count differ between them."""
    draw = torch.Generator().manual_seed(7)
    size, vocab = (cfg.train.microbatch, cfg.model.seq_length), cfg.model.vocab_size
    out = []
    for number in range(cfg.train.global_batch // cfg.train.microbatch):
        tokens, labels = torch.randint(vocab, (2, *size), generator=draw)
        counts = torch.rand(size, generator=draw) < 1 / (1 + number % 3)
        out.append({"tokens": tokens, "labels": labels, "weights": counts.float()})
    return out


def take(step: TrainStep, state: TrainState, batches: Sequence[Mapping[str, Tensor]]) -> Taken:
    """Make a step on this rank's part of the microbatches."""
    local = [step.local(batch) for batch in batches]
    step.gradients(step.with_keys(local, state.step))  # a step may scale gradients in place
    found = whole_gradients(step.gradients)
    grads = {
        (leaf.path, layer): view.clone()
        for group in step.groups
        if group.trained
        for leaf, layer, view in group.rows(found[group.name])
    }
    state, metrics = step(state, local)
    after = step.evaluate(local)["loss"].item()
    state.weights.settle()
    return Taken(
        loss=metrics.loss.item(),
        norm=metrics.grad_norm.item(),
        after=after,
        grads=grads,
        loads={k: x.double().cpu() for k, x in metrics.outs.items() if k.endswith(".load")},
    )


def plain(
    step: TrainStep, state: TrainState, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[float, dict[Key, Tensor]]:
    """Return the loss and the gradients of the model's own fold, differentiated by torch alone."""
    model: Chain = step.program.model
    leaves = optree.tree_map(lambda w: w.detach().clone().requires_grad_(), step.params(state))
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        _, outs = model.apply(leaves, step.local(batch))
        for name, pair in _terms(outs):
            sums.setdefault(name, []).append(pair)
    loss = torch.zeros((), dtype=torch.float64, device=step.comm.device)
    for pairs in sums.values():
        total, weight = (torch.stack(parts).double().sum(0) for parts in zip(*pairs, strict=True))
        loss = loss + (total / weight).sum()
    loss.backward()
    names, flat, _ = flatten_with_names(leaves)
    whole = {name: leaf.grad for name, leaf in zip(names, flat, strict=True)}
    grads = {
        (leaf.path, layer): whole[leaf.path] if layer is None else whole[leaf.path][layer]
        for group in step.groups
        if group.trained
        for leaf in group.leaves
        for layer in group.layers or [None]
    }
    return loss.item(), grads


def _terms(outs: Any) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    for name, value in outs.items():
        if name == "terms":
            yield from value.items()
        elif isinstance(value, Mapping):
            yield from _terms(value)


def reference(device: torch.device, cfg: RunConfig, file: str) -> dict[str, Any]:
    """Make the step on one device, compare it with `plain`, and leave it in a file for `compare`.

    Returns:
        As `compare`.
    """
    job = open_job(device, cfg, lambda kind, fields: None)
    batches = microbatches(cfg)
    with caring(cfg, layout_of_run(cfg).mesh, job.world, job.recorder, device):
        loss, grads = plain(job.step, job.progress.state, batches)
        ours = take(job.step, job.progress.state, batches)
    torch.save({**vars(ours), "grads": {k: x.cpu() for k, x in ours.grads.items()}}, file)
    theirs = replace(ours, loss=loss, grads=grads)
    return _merged([_errors(job.step, ours, theirs)], set(grads))


def compare(device: torch.device, cfg: RunConfig, file: str) -> dict[str, Any]:
    """Make the step on this rank and compare it with that of one device.

    Args:
        device: of this rank.
        cfg: the run.
        file: what `reference` left, of the same model, weights and tokens.

    Returns:
        On rank 0, of all ranks: "leaves", path -> the largest relative L2 error of any rank's part
        of any layer; relative errors of the loss, of the norm and of the loss after the update;
        leaves that no rank has; how many choices of experts differ.
    """
    job = open_job(device, cfg, lambda kind, fields: None)
    theirs = Taken(**torch.load(Path(file), mmap=True))
    # Sets how products round (no TF32); tells which ranks and calls are in a hang.
    with caring(cfg, layout_of_run(cfg).mesh, job.world, job.recorder, device):
        ours = take(job.step, job.progress.state, microbatches(cfg))
        found = job.world.gather(_errors(job.step, ours, theirs))
    return _merged(found, set(theirs.grads))


def compare_all(
    device: torch.device, cases: Sequence[tuple[str, RunConfig]], file: str, done: str
) -> None:
    """Do what `compare` does for several runs in turn; each adds a line to the file `done`."""
    for name, cfg in cases:
        clock = time.perf_counter()
        found = compare(device, cfg, file)
        if current_world().rank == 0:
            row = {"layout": name, "seconds": time.perf_counter() - clock, **found}
            with Path(done).open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


def _errors(step: TrainStep, ours: Taken, theirs: Taken) -> dict[str, Any]:
    """Return how far this rank is off."""
    sizes, coords = step.program.layout.sizes, step.comm.coords
    leaves: dict[str, float] = {}
    for (path, layer), grad in ours.grads.items():
        whole = theirs.grads[path, layer]
        mine = cut(whole, step.program.types[path].spec, sizes, coords).to(grad.device)
        leaves[path] = _worse(leaves.get(path, 0.0), distance(grad, mine))
    moved = sum((x - theirs.loads[k]).abs().sum().item() / 2 for k, x in ours.loads.items())
    numbers = {
        name: _relative(getattr(ours, name), getattr(theirs, name))
        for name in ("loss", "norm", "after")
    }
    return {**numbers, "leaves": leaves, "keys": set(ours.grads), "moved": round(moved)}


def _merged(found: Sequence[Mapping[str, Any]], keys: set[Key]) -> dict[str, Any]:
    """Return the worst of all ranks."""
    leaves: dict[str, float] = {}
    for one in found:
        for path, error in one["leaves"].items():
            leaves[path] = _worse(leaves.get(path, 0.0), error)
    held = set().union(*(one["keys"] for one in found))
    worst = max(leaves, key=lambda path: _size(leaves[path]))
    return {
        **{
            name: max((one[name] for one in found), key=_size) for name in ("loss", "norm", "after")
        },
        "grads": leaves[worst],
        "worst": worst,
        "leaves": {path: float(f"{error:.3g}") for path, error in leaves.items()},
        "missing": sorted({path for path, _ in keys - held}),
        "moved": found[0]["moved"],
    }


def _relative(got: float, expected: float) -> float:
    return abs(got - expected) / abs(expected)


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference over that of what is expected.

    Where that is 0 any difference is infinite.
    """
    off = (got.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return off / norm if norm else (0.0 if off == 0.0 else math.inf)


def _size(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _worse(a: float, b: float) -> float:
    return max(a, b, key=_size)


def wrong(row: Mapping[str, Any]) -> str:
    """Return what is wrong with a row, "" for nothing."""
    if row.get("error"):
        return str(row["error"])
    found = []
    if row["missing"]:
        found.append(f"no rank has the gradients of {', '.join(row['missing'][:4])}")
    for name, limit in LIMITS.items():
        if not row[name] <= limit:
            of = f" ({row['worst']})" if name == "grads" else ""
            found.append(f"{name}{of} off by {row[name]:.2g}, allowed {limit:.0e}")
    if found and row["moved"]:
        found.append(f"{row['moved']} tokens went to other experts")
    return "; ".join(found)
