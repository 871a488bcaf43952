"""`megatree demo`: the whole story in minutes: train, change the mesh, generate."""

import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from megatree.cli.explain import explain
from megatree.cli.progress import show


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What `megatree demo` takes.

    Args:
        steps: training steps; 0 for the 400 that reach the target, fewer check all the rest.
        dir: folder to keep the checkpoints in, which must not hold any; "" keeps nothing.
    """

    steps: int = 0
    dir: str = ""


ABOUT = (
    "Train a small Llama on the novels inside the package with tensor and sequence parallelism, go "
    "on from its checkpoint with data parallelism, and write a text. Needs two CPU cores."
)


def main(args: list[str]) -> int:
    """Run the command; return 0 if the losses are as they must be, else 1."""
    options = tyro.cli(Demo, prog="megatree demo", description=ABOUT, args=args)
    if options.steps < 0 or options.steps == 1:
        raise ValueError(f"--steps: {options.steps}. Give at least 2 (one per mesh), or 0.")
    kept = nullcontext(options.dir) if options.dir else tempfile.TemporaryDirectory()
    with kept as directory:
        return _run(directory, options.steps)


def _run(directory: str, steps: int) -> int:
    from megatree.recipes.demo import PROMPT, TARGET, demo_configs, run_demo, text_entropy

    console, began = Console(highlight=False), time.monotonic()

    def say(heading: str) -> None:
        console.print()
        console.rule(f"[bold]{heading}[/]", align="left")
        sys.stdout.flush()  # the processes to come print to the same place

    first, _ = demo_configs(directory, steps)
    say("The plan of one block, on each of the two processes")
    explain(first)
    tokens, entropy = text_entropy()
    console.print(
        f"The text has {tokens:,} tokens; their unigram entropy is {entropy:.3f} nats: what a "
        "model that ignores all context would reach.",
        soft_wrap=True,
    )
    outcome = run_demo(directory, steps=steps, report=show, say=say)
    console.print(Panel(Text(f"{PROMPT}{outcome.sample}"), title="a sample", title_align="left"))
    trained, ended = outcome.phases
    goal = f"the target is {TARGET}"
    if not outcome.full:
        goal = f"too few steps for the target of {TARGET}, which is not checked"
    console.print(
        f"fixed batch: loss {trained.after:.7f} before the change of mesh, "
        f"{ended.before:.7f} after (difference {outcome.gap:.1e})\n"
        f"held-out loss: {ended.valid_loss:.4f} nats per token, {entropy:.3f} without context; "
        f"{goal}",
        soft_wrap=True,
    )
    console.print(f"{time.monotonic() - began:,.0f} s in all")
    for failure in outcome.failures:
        console.print(f"[bold red]failed:[/] {failure}")
    if not outcome.failures:
        console.print("[bold green]passed[/]")
    return 1 if outcome.failures else 0
