"""The demo job: train on one mesh, go on from its checkpoint on another, and write a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatree.io.data import encode_documents, load_demo, unigram_entropy
from megatree.recipes.config import MeshConfig, RunConfig, megatron_rules
from megatree.recipes.job import open_job
from megatree.recipes.presets import demo
from megatree.recipes.sample import Sampling, sample
from megatree.recipes.start import start
from megatree.runtime.train import Report

TARGET = 3.2
"""Nats per token that the held-out loss must reach: far below the unigram entropy, 5.3."""

AGREES = 1e-5
"""Nats by which a fixed batch's loss may differ between meshes: float32 sums in other orders."""

PROMPT = "It is a truth universally acknowledged, that"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one mesh's part of the demo found.

    Args:
        first_step: where it began.
        before, after: loss of the fixed batch at its first and last step.
        valid_loss: held-out loss at the last step.
    """

    first_step: int
    before: float
    after: float
    valid_loss: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the demo found.

    Args:
        phases: per mesh, in order.
        sample: the continuation of `PROMPT`.
        full: whether it trained long enough to be held to the target.
    """

    phases: tuple[Phase, Phase]
    sample: str
    full: bool

    @property
    def gap(self) -> float:
        """Difference of the fixed batch's loss over the change of mesh, in nats."""
        return abs(self.phases[1].before - self.phases[0].after)

    @property
    def failures(self) -> list[str]:
        """What went wrong, one sentence each."""
        found = []
        if not self.gap <= AGREES:
            found.append(f"the fixed batch's losses differ by {self.gap:.2e}, more than {AGREES}.")
        if self.full and not self.phases[1].valid_loss <= TARGET:
            found.append(f"the held-out loss is {self.phases[1].valid_loss:.4f}, above {TARGET}.")
        return found


def demo_configs(directory: str, steps: int = 0) -> tuple[RunConfig, RunConfig]:
    """Return the configs of the two phases: tp=2 with sequence parallelism, then dp=2.

    Args:
        directory: for the checkpoints.
        steps: of both together; 0 for the recipe's.
    """
    cfg = demo()
    checkpoint = replace(cfg.checkpoint, dir=directory, every=0)
    train = replace(cfg.train, steps=steps or cfg.train.steps)
    first = replace(cfg, checkpoint=checkpoint, train=train)
    return first, replace(first, mesh=MeshConfig(dp=2), rules=megatron_rules())


def run_demo(directory: str, *, steps: int, report: Report, say: Callable[[str], None]) -> Outcome:
    """Run the demo with four processes, two at a time.

    Args:
        directory: for the checkpoints; it must hold none.
        steps: of both phases together; 0 for the recipe's.
        report: what rank 0 does with news; it must pickle.
        say: called with a heading before each part.
    """
    first, second = demo_configs(directory, steps)
    change = max(1, first.train.steps * 3 // 4)
    say(f"Training on 2 processes: {first.mesh}, sequence parallel")
    trained = start(phase, first.mesh, first, report, change)
    say(f"Going on in 2 new processes: {second.mesh}")
    ended = start(phase, second.mesh, second, report, second.train.steps)
    say("Generating on one process")
    how = Sampling(max_tokens=80, temperature=0.7)
    text = start(sample, MeshConfig(), directory, MeshConfig(), (PROMPT,), how)[0]
    full = first.train.steps >= demo().train.steps
    return Outcome(phases=(trained, ended), sample=text, full=full)


def phase(device: torch.device, cfg: RunConfig, report: Report, stop: int) -> Phase:
    """Train on one mesh up to a step; every rank calls it."""
    heard: dict[str, float] = {}

    def listen(kind: str, fields: Mapping[str, Any]) -> None:
        report(kind, fields)
        if kind == "eval":
            heard["valid_loss"] = fields["valid_loss"]

    job = open_job(device, cfg, listen)
    fixed = cfg.train.microbatch
    first_step = job.progress.state.step
    before = job.valid_loss(fixed)
    job = job.train(stop=stop)
    after = job.valid_loss(fixed)
    return Phase(
        first_step=first_step,
        before=before,
        after=after,
        valid_loss=heard.get("valid_loss", float("nan")),
    )


def text_entropy() -> tuple[int, float]:
    """Return the number of tokens of the demo's text, and their unigram entropy in nats."""
    text = load_demo()
    tokens = encode_documents(text.texts, text.tokenizer).tokens
    return len(tokens), unigram_entropy(tokens)
