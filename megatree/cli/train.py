"""`megatree train RECIPE`: train a config on the processes of its mesh."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from megatree.cli.progress import show
from megatree.cli.recipe import read_recipe
from megatree.recipes.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """What `megatree train` takes.

    Args:
        config: the run.
        nproc: processes to start on this machine; 0 for as many as the mesh has ranks.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    nproc: int = 0


ABOUT = "Train a recipe. Where its folder has checkpoints, it goes on from the latest."


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    cfg = read_recipe("megatree train", args, about=ABOUT)
    prog = f"megatree train {args[0]}"
    options = tyro.cli(
        Train, default=Train(config=cfg), prog=prog, description=ABOUT, args=args[1:]
    )
    from megatree.recipes.job import run
    from megatree.recipes.start import start

    start(run, options.config.mesh, options.config, show, nproc=options.nproc)
    return 0
