"""A profile of a run: what is recorded, and the ceilings that its table is held against."""

from pathlib import Path

import torch

from megatree.io.world import World
from megatree.parallel.model import ModelProgram
from megatree.parallel.plan import plan
from megatree.parallel.plan.ceilings import ceilings, device_of
from megatree.recipes.build import DTYPES, layout_of_run, model_of, moments_of, precision_of
from megatree.recipes.config import RunConfig
from megatree.recipes.profile_config import ProfileConfig
from megatree.runtime.profile import StepProfile
from megatree.runtime.time_table import TimeTable
from megatree.runtime.train import Report


def profile_of(
    said: ProfileConfig,
    cfg: RunConfig,
    program: ModelProgram,
    *,
    world: World,
    device: torch.device,
    step: int,
    report: Report,
) -> StepProfile:
    """Return what records the profiled steps of this rank; each rank writes a trace of its own.

    Args:
        said: the steps and the folder.
        cfg: the run.
        program: its model, lowered.
        world: its processes.
        device: of this rank.
        step: that the run begins at.
        report: called on rank 0, with a "profile".

    Raises:
        ValueError: the run does not make these steps.
    """
    first, stop = said.range
    folder = Path(said.dir or Path(cfg.checkpoint.dir) / "profile")
    file = folder / f"steps_{step + first}_{step + stop}_rank_{world.rank}.json"

    def done(table: TimeTable) -> None:
        if world.rank == 0:
            report("profile", {"step": step + stop, "trace": str(file), **table.as_dict()})

    return StepProfile(
        first, stop, file=file, device=device, ceilings=_ceilings(cfg, program, device), done=done
    )


def _ceilings(cfg: RunConfig, program: ModelProgram, device: torch.device) -> dict[str, float]:
    """Return the ceilings where the device is known; none elsewhere."""
    known = device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return {}
    made = plan(
        model_of(cfg),
        layout_of_run(cfg),
        num_microbatches=cfg.train.global_batch // cfg.train.microbatch,
        precision=precision_of(cfg),
        moments=moments_of(cfg),
    )
    return ceilings(made, program, known, DTYPES[cfg.dtype])
