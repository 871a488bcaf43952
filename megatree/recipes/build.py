"""From a config to the values it names: layout, model, optimizer."""

from collections.abc import Mapping
from functools import partial

import torch

from megatree.functional.chain import Chain
from megatree.models.gpt import gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.placement import Placement
from megatree.parallel.schedule import (
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.recipes.config import MeshConfig, PipelineConfig, RunConfig
from megatree.recipes.schedule import warmup_cosine
from megatree.runtime.adamw import Optimizer, Schedule, adamw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


SCHEDULES = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
    "zb-h1": zero_bubble_h1,
    "zb-v": zero_bubble_v,
}


def layout_of(
    mesh: MeshConfig,
    rules: Mapping[str, tuple[str, ...]],
    pipeline: PipelineConfig | None = None,
) -> Layout:
    """Return a mesh, its rules (those that cut nothing there are left out) and its pipeline."""
    cuts = {
        axis: tuple(mesh_axis for mesh_axis in cut_by if mesh.sizes.get(mesh_axis, 1) > 1)
        for axis, cut_by in rules.items()
    }
    made = Rules(**{axis: cut_by for axis, cut_by in cuts.items() if cut_by})
    if mesh.pp == 1:
        return Layout(Mesh(**mesh.sizes), made)
    pipeline = pipeline or PipelineConfig()
    if pipeline.schedule == "interleaved":
        schedule = partial(interleaved, num_virtual=pipeline.virtual)
    else:
        schedule = SCHEDULES[pipeline.schedule]
    layers = pipeline.layers_per_stage
    placement = Placement(layers_per_stage=layers) if layers else None
    return Layout(Mesh(**mesh.sizes), made, placement, schedule)


def layout_of_run(cfg: RunConfig) -> Layout:
    """Return the layout of a run."""
    return layout_of(cfg.mesh, cfg.rules, cfg.pipeline)


def model_of(cfg: RunConfig) -> Chain:
    """Return the model for one microbatch."""
    return gpt(cfg.model, batch_size=cfg.train.microbatch, dtype=DTYPES[cfg.dtype])


def schedule_of(cfg: RunConfig) -> Schedule:
    """Return the learning rate as a function of the step."""
    opt = cfg.optimizer
    return warmup_cosine(
        opt.lr, min_lr=opt.min_lr, warmup_steps=opt.warmup_steps, steps=cfg.train.steps
    )


def optimizer_of(cfg: RunConfig) -> Optimizer:
    """Return AdamW under the schedule."""
    opt = cfg.optimizer
    return adamw(schedule_of(cfg), betas=opt.betas, eps=opt.eps, weight_decay=opt.weight_decay)
