"""`megatree plan RECIPE`: memory, collectives and time of a run before it runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from megatree.cli.recipe import read_recipe
from megatree.recipes.config import RunConfig

if TYPE_CHECKING:
    from megatree.parallel.plan import Estimate, Plan


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What `megatree plan` takes.

    Args:
        config: the run.
        json: print the plan as JSON.
        html: write a page with the plan to this file.
        diff: a recipe or a config.json: print what changes from it to this run.
        plot: write a picture of the pipeline's timeline to this PNG.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    json: bool = False
    html: str = ""
    diff: str = ""
    plot: str = ""


ABOUT = "Plan a run: memory, collectives, FLOPs and time per step; nothing is allocated."


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    cfg = read_recipe("megatree plan", args, about=ABOUT)
    prog = f"megatree plan {args[0]}"
    options = tyro.cli(
        PlanCommand, default=PlanCommand(config=cfg), prog=prog, description=ABOUT, args=args[1:]
    )
    run(options)
    return 0


def plan_of(cfg: RunConfig) -> "Plan":
    """Return the plan of a run's step."""
    from megatree.parallel.plan import plan
    from megatree.recipes.build import layout_of_run, model_of

    micro = cfg.train.global_batch // cfg.train.microbatch
    return plan(model_of(cfg), layout_of_run(cfg), num_microbatches=micro)


def run(options: PlanCommand) -> None:
    """Print or write what was asked for.

    Raises:
        ValueError: the model cannot be typed under this layout, or a picture is asked of a run
            without a pipeline.
    """
    from megatree.parallel.plan import estimate

    made = plan_of(options.config)
    guess = estimate(made)
    if options.plot:
        _plot(options.config, options.plot)
    if options.html:
        from megatree.cli.plan_page import page

        Path(options.html).write_text(page(options.config, made, guess), encoding="utf-8")
    if options.json:
        print(json.dumps(made.as_dict(), indent=2))
        return
    console = Console()
    if options.diff:
        other = plan_of(read_recipe("megatree plan --diff", [options.diff], about=ABOUT))
        rows = differences(other.as_dict(), made.as_dict())
        console.print(diff_table(options.diff, rows))
        return
    print_plan(console, made, guess)


def _plot(cfg: RunConfig, file: str) -> None:
    from megatree.parallel.schedule import draw, plot, timeline
    from megatree.recipes.build import layout_of_run

    layout = layout_of_run(cfg)
    if layout.num_stage_ranks == 1:
        raise ValueError(
            "plot: this run has no pipeline, so there is no timeline. Set mesh.pp to 2 or more."
        )
    drawn = timeline(layout.schedule_for(cfg.train.global_batch // cfg.train.microbatch))
    print(draw(drawn))
    try:
        plot(drawn, file)
    except ImportError as error:
        raise ValueError(str(error)) from None


def print_plan(console: Console, made: "Plan", guess: "Estimate") -> None:
    """Print a plan and its estimate as tables."""
    console.print(
        f"{made.num_params:,} parameters on {made.num_ranks:,} ranks ({made.mesh}), "
        f"{made.num_microbatches} microbatch{'es' if made.num_microbatches > 1 else ''}, "
        f"{made.tokens_per_step:,} tokens a step, "
        f"{made.flops_per_token / 1e9:.3f} GFLOPs a token",
        highlight=False,
    )
    console.print(memory_table(made))
    console.print(collectives_table(made))
    console.print(f"Estimate on H100s: {guess}", highlight=False)


def memory_table(made: "Plan") -> Table:
    """Return memory and work per pipeline rank."""
    title = "One rank of each pipeline rank: parameters, and memory in MiB"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in (
        "pp", "stages", "parameters", "weights", "grads", "optim.", "kept", "live", "peak",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for s in made.stages:
        sizes = (s.parameter_bytes, s.gradient_bytes, s.optimizer_bytes, s.activation_bytes)
        table.add_row(
            str(s.rank),
            " ".join(map(str, s.stages)),
            f"{s.parameters:,}",
            *(mib(n) for n in sizes),
            f"{s.live_microbatches:g}",
            mib(s.peak_bytes),
        )
    return table


def collectives_table(made: "Plan") -> Table:
    """Return the collectives of a step, the largest first."""
    title = "Collectives of one rank, one step (those marked ~ can run under compute)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("phase", "unit", "at", "collective", "over"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MiB", "times"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in made.collectives:
        phase = f"~{c.phase}" if c.overlappable else c.phase
        size = f"{c.bytes / 2**20:,.2f}"
        table.add_row(phase, c.unit, c.source, c.kind, " ".join(c.axes), size, str(c.count))
    if not made.collectives:
        table.add_row("none", *[""] * 6)
    return table


def mib(size: int) -> str:
    """Spell bytes in MiB."""
    return f"{size / 2**20:,.1f}"


def differences(a: object, b: object, place: str = "") -> list[tuple[str, str, str]]:
    """Return (field, before, after) of every leaf that differs between two plans as plain
    values.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        pairs = [(f"{place}.{k}" if place else str(k), a.get(k), b.get(k)) for k in keys]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        named_a, named_b = _named(a), _named(b)
        keys = list(dict.fromkeys([*named_a, *named_b]))
        pairs = [(f"{place}[{k}]", named_a.get(k), named_b.get(k)) for k in keys]
    else:
        return [] if a == b else [(place, _short(a), _short(b))]
    return [row for name, x, y in pairs for row in differences(x, y, name)]


def _named(items: list[object] | tuple[object, ...]) -> dict[str, object]:
    """Key a list: collectives by what they are, other things by position."""
    out: dict[str, object] = {}
    for i, item in enumerate(items):
        if isinstance(item, dict) and "kind" in item:
            key = " ".join(str(item[k]) for k in ("phase", "unit", "source", "kind"))
            key = f"{key} {'.'.join(item['axes'])}"
        else:
            key = str(i)
        out[key if key not in out else f"{key} #{i}"] = item
    return out


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items() if k in ("bytes", "count")) or "..."
    return f"{value:,}" if isinstance(value, int) else str(value)


def diff_table(other: str, rows: list[tuple[str, str, str]]) -> Table:
    """Return what changes from another plan to this one."""
    table = Table(title=f"From {other} to this run", title_justify="left", box=box.SIMPLE)
    for heading in ("field", "before", "after"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not rows:
        table.add_row("nothing changes", "", "")
    return table
