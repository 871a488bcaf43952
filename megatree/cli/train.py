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
        layout: a saved layout, or a config.json: take mesh, rules, pipeline and context from it.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    nproc: int = 0
    layout: str = ""


ABOUT = "Train a recipe. Where its folder has checkpoints, it goes on from the latest."


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    cfg = read_recipe("megatree train", args, about=ABOUT)
    prog = f"megatree train {args[0]}"
    options = tyro.cli(
        Train, default=Train(config=cfg), prog=prog, description=ABOUT, args=args[1:]
    )
    from megatree.recipes.build import check_pipeline
    from megatree.recipes.care import group_timeout
    from megatree.recipes.job import run
    from megatree.recipes.start import start

    check_pipeline(options.config)
    cfg = options.config
    start(run, cfg.mesh, cfg, show, nproc=options.nproc, timeout_s=group_timeout(cfg))
    return 0
