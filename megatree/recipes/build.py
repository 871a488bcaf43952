"""From a config to the values it names: layout, model, optimizer."""

from collections.abc import Mapping

import torch

from megatree.functional.chain import Chain
from megatree.models.gpt import gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.recipes.config import MeshConfig, RunConfig
from megatree.recipes.schedule import warmup_cosine
from megatree.runtime.adamw import Optimizer, Schedule, adamw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def layout_of(mesh: MeshConfig, rules: Mapping[str, tuple[str, ...]]) -> Layout:
    """Return a mesh and its rules; rules that cut nothing there are left out."""
    cuts = {
        axis: tuple(mesh_axis for mesh_axis in cut_by if mesh.sizes[mesh_axis] > 1)
        for axis, cut_by in rules.items()
    }
    rules = {axis: cut_by for axis, cut_by in cuts.items() if cut_by}
    return Layout(Mesh(dp=mesh.dp, tp=mesh.tp), Rules(**rules))


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
