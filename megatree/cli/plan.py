"""`megatree plan RECIPE`: memory, collectives and time of a run before it runs."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatree.cli.recipe import read_recipe
from megatree.recipes.config import RunConfig
from megatree.recipes.layout_file import is_layout, save_layout, with_layout

if TYPE_CHECKING:
    from megatree.parallel.plan import Change, Estimate, Plan
    from megatree.parallel.plan.context import Recommendation


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What `megatree plan` takes.

    Args:
        config: the run.
        json: print the plan as JSON.
        html: write a page with the plan to this file.
        diff: a recipe, a config.json or a saved layout: print what changes from it to this run.
        layout: a saved layout, or a config.json: take mesh, rules, pipeline and context from it.
        save_layout: write the run's layout to this JSON file, for --layout and --diff.
        plot: write a picture of the pipeline's timeline to this PNG.
        device: what the time is estimated for.
        link: GB/s of one rank's link among the ranks of mesh.cp, for the lowering of attention that
            is recommended; 0 for an H100's, in its node or beyond it.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    json: bool = False
    html: str = ""
    diff: str = ""
    layout: str = ""
    save_layout: str = ""
    plot: str = ""
    device: Literal["h100", "a100"] = "h100"
    link: float = 0.0


ABOUT = "Plan a run: memory, collectives, FLOPs and time per step; nothing is allocated."


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    cfg = read_recipe("megatree plan", args, about=ABOUT)
    prog = f"megatree plan {args[0]}"
    args = ["--pipeline.schedule" if arg == "--schedule" else arg for arg in args]
    options = tyro.cli(
        PlanCommand, default=PlanCommand(config=cfg), prog=prog, description=ABOUT, args=args[1:]
    )
    run(options)
    return 0


def plan_of(cfg: RunConfig) -> "Plan":
    """Return the plan of a run's step."""
    from megatree.parallel.plan import plan
    from megatree.recipes.build import layout_of_run, model_of, moments_of, precision_of

    micro = cfg.train.global_batch // cfg.train.microbatch
    return plan(
        model_of(cfg),
        layout_of_run(cfg),
        num_microbatches=micro,
        precision=precision_of(cfg),
        moments=moments_of(cfg),
    )


def run(options: PlanCommand) -> None:
    """Print or write what was asked for.

    Raises:
        ValueError: the model cannot be typed under this layout, or a picture is asked of a run
            without a pipeline.
    """
    from megatree.parallel.plan import DEVICES, differences, estimate

    made = plan_of(options.config)
    device = DEVICES[options.device]
    guess = estimate(made, device)
    if options.plot:
        _plot(options.config, options.plot)
    if options.html:
        from megatree.cli.plan_page import page

        Path(options.html).write_text(page(options.config, made, guess), encoding="utf-8")
    if options.save_layout:
        save_layout(options.config, options.save_layout)
    if options.diff:
        changes = differences(plan_of(_other(options)), made)
        if options.json:
            print(json.dumps([asdict(change) for change in changes], indent=2))
        else:
            Console().print(diff_table(options.diff, changes))
    elif options.json:
        print(json.dumps(made.as_dict(), indent=2))
    else:
        print_plan(Console(), made, guess, device.name)
        if options.config.mesh.cp > 1:
            console = Console(soft_wrap=True)
            moved = made.context_bytes / 2**20
            console.print(f"Context parallelism: {moved:,.1f} MiB a step and rank", highlight=False)
            console.print(escape(str(advice(options.config, options.link))), highlight=False)


def advice(cfg: RunConfig, link: float = 0.0) -> "Recommendation":
    """Return which lowering of attention to take for a run's sequence, heads, cp and link, GB/s."""
    from megatree.parallel.plan.context import Attention, recommend
    from megatree.recipes.build import DTYPES

    sizes = cfg.mesh.sizes

    def parts(axis: str) -> int:
        return math.prod(sizes.get(mesh_axis, 1) for mesh_axis in cfg.rules.get(axis, ()))

    work = Attention(
        batch=cfg.train.microbatch // parts("batch"),
        seq=cfg.model.seq_length,
        kv_heads=cfg.model.kv_heads // parts("kv_heads"),
        group=cfg.model.group // parts("group"),
        head_dim=cfg.model.head_dim + (cfg.model.rope_dim or 0),
        itemsize=DTYPES[cfg.dtype].itemsize,
    )
    return recommend(work, cfg.mesh.cp, bandwidth=link * 1e9 or None)


def _other(options: PlanCommand) -> RunConfig:
    """Return the run that `--diff` names; a saved layout is one of this run's model."""
    if options.diff.endswith(".json") and is_layout(options.diff):
        return with_layout(options.config, options.diff)
    return read_recipe("megatree plan --diff", [options.diff], about=ABOUT)


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


def print_plan(console: Console, made: "Plan", guess: "Estimate", device: str) -> None:
    """Print a plan and its estimate as tables."""
    console.print(
        f"{made.num_params:,} parameters on {made.num_ranks:,} ranks ({made.mesh}), "
        f"{made.num_microbatches} microbatch{'es' if made.num_microbatches > 1 else ''}, "
        f"{made.tokens_per_step:,} tokens a step, "
        f"{made.flops_per_token / 1e9:.3f} GFLOPs a token",
        highlight=False,
    )
    if made.storage != "whole":
        console.print(f"Storage: {made.storage}{stored_whole(made)}", highlight=False)
    if made.experts:
        console.print(expert_lines(made), highlight=False)
    console.print(memory_table(made))
    console.print(collectives_table(made))
    console.print(f"Estimate on {device}: {guess}", highlight=False)


def expert_lines(made: "Plan") -> str:
    """Return what travels to experts and back; FLOPs are those of the experts that tokens take."""
    total = f"Expert traffic: {made.expert_bytes / 2**20:,.1f} MiB leave a rank in a step"
    twice = ", a forward to count choices first included" if made.surveys else ""
    return "\n".join([total + twice, *(f"  {traffic}" for traffic in made.experts)])


def stored_whole(made: "Plan") -> str:
    """Return what storage asks to cut, but no dim of it divides."""
    paths = sorted({path for s in made.stages for path in s.stored_whole})
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return f" (stored whole: {', '.join(paths[:8])}{more})" if paths else ""


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


def diff_table(other: str, changes: "Sequence[Change]") -> Table:
    """Return what changes from another plan to this one."""
    title = f"What changes from {other} to this run (one rank; collectives of one step)"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("what", "before", "after"):
        table.add_column(heading, overflow="fold", justify="left")
    last = ""
    for change in changes:
        if change.part != last:
            table.add_row(f"[bold]{change.part}[/bold]", "", "", end_section=False)
            last = change.part
        table.add_row(*(escape(x) for x in (change.what, change.before, change.after)))
    if not changes:
        table.add_row("nothing changes", "", "")
    return table
