"""`megatree train RECIPE`: train a config on the processes of its mesh."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from megatree.cli.progress import show
from megatree.cli.recipe import read_recipe
from megatree.recipes.config import RunConfig
from megatree.recipes.profile_config import ProfileConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """What `megatree train` takes.

    Args:
        config: the run.
        nproc: processes to start on this machine; 0 for as many as the mesh has ranks.
        layout: a saved layout, or a config.json: take mesh, rules, pipeline and context from it.
        profile: write a trace of a few steps, and print where their time goes.
        profile_steps: first:stop of these steps, counted from 0 where this run begins.
        profile_dir: folder of the trace; "" for "profile" in checkpoint.dir.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    nproc: int = 0
    layout: str = ""
    profile: bool = False
    profile_steps: str = ProfileConfig.steps
    profile_dir: str = ""


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
    cfg, profile = options.config, profile_of(options)
    start(run, cfg.mesh, cfg, show, profile, nproc=options.nproc, timeout_s=group_timeout(cfg))
    return 0


def profile_of(options: Train) -> ProfileConfig | None:
    """Return what is profiled, None for nothing.

    Raises:
        ValueError: it is said how, but not that.
    """
    said = ProfileConfig(steps=options.profile_steps, dir=options.profile_dir)
    if not options.profile and said != ProfileConfig():
        raise ValueError(
            "--profile-steps, --profile-dir: they say how to profile, and --profile is not given. "
            "Add --profile, or leave them out."
        )
    return said if options.profile else None
