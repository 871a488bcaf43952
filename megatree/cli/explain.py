"""`megatree explain RECIPE`: what a rank runs, without running it."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from megatree.cli.recipe import read_recipe
from megatree.io.optional import optional
from megatree.recipes.config import RunConfig
from megatree.recipes.words import did_you_mean

if TYPE_CHECKING:
    from megatree.parallel.model import ModelProgram
    from megatree.parallel.program import Program


@dataclass(frozen=True, kw_only=True)
class Explain:
    """What `megatree explain` takes.

    Args:
        config: the run.
        unit: the segment, or the kind of block, whose program is printed; empty for the kind of the
            first layer.
        layout: a saved layout, or a config.json: take mesh, rules, pipeline and context from it.
        against_jax: print the collectives that XLA's partitioner (GSPMD) chose beside ours; JAX
            compiles the unit for as many CPU devices as the mesh has ranks, and runs nothing.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    unit: str = ""
    layout: str = ""
    against_jax: bool = False


ABOUT = "Print the program of one block on one rank, and its collectives; nothing is trained."


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    cfg = read_recipe("megatree explain", args, about=ABOUT)
    prog = f"megatree explain {args[0]}"
    options = tyro.cli(
        Explain, default=Explain(config=cfg), prog=prog, description=ABOUT, args=args[1:]
    )
    explain(options.config, options.unit, against_jax=options.against_jax)
    return 0


def explain(cfg: RunConfig, unit: str = "", *, against_jax: bool = False) -> None:
    """Print the lowered program of a unit, and a table of its collectives.

    Args:
        cfg: the run.
        unit: a segment, or a kind of block; "" for the kind of the first layer.
        against_jax: print the table of `against_jax` too.

    Raises:
        ValueError: the model has no such unit, cannot be typed under this layout, or JAX is not
            installed.
    """
    if against_jax:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when JAX is imported
        optional("jax", extra="jax", purpose="--against-jax")
    from megatree.parallel.model import lower_model
    from megatree.recipes.build import layout_of_run, model_of

    program = lower_model(model_of(cfg), layout_of_run(cfg))
    unit = unit or next(name for name, index, _ in program.order if index is not None)
    if unit not in program.units:
        raise ValueError(
            f"unit: the model has no {unit!r}{did_you_mean(unit, program.units)}. "
            f"Use one of {', '.join(program.units)}."
        )
    print(program.explain(unit))
    print()
    Console().print(collectives_table(program.units[unit].program))
    if against_jax:
        print(beside_jax(program, unit))


def beside_jax(program: "ModelProgram", unit: str) -> str:
    """Return our collectives of a unit beside those that XLA chose.

    Raises:
        ShardingError: JAX has started with fewer devices than the mesh has ranks.
    """
    from megatree.runtime.jax.collectives import against_jax

    note = "On a CPU, XLA writes a reduce-scatter as a psum and a slice; its sync is in backward."
    return f"{against_jax(program, unit)}\n{note}"


def collectives_table(program: "Program") -> Table:
    """Return the collectives of a program as a table."""
    table = Table(
        title=f"Collectives of {program.name}, one rank, one microbatch",
        title_justify="left",
        box=box.SIMPLE,
    )
    for heading in ("phase", "at", "collective", "over"):
        table.add_column(heading)
    table.add_column("KiB", justify="right")
    for call in program.collectives:
        size = f"{call.bytes / 1024:,.1f}"
        phase = "per step" if call.phase == "sync" else call.phase
        table.add_row(phase, call.source, call.kind, " ".join(call.axes), size)
    if not table.row_count:
        table.add_row("none", "", "", "", "")
    return table
