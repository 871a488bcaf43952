"""From a config to the values it names: layout, model, optimizer."""

from dataclasses import replace

import torch

from megatree.functional.chain import Chain
from megatree.models.gpt import gpt
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.recipes.config import RunConfig
from megatree.recipes.schedule import warmup_cosine
from megatree.runtime.adamw import Optimizer, Schedule, adamw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def layout_of(cfg: RunConfig) -> Layout:
    """Return the mesh and the rules; axes that nothing cuts are left out."""
    rules = {axis: cut_by for axis, cut_by in cfg.rules.items() if cut_by}
    return Layout(Mesh(**cfg.mesh.sizes), Rules(**rules))


def model_of(cfg: RunConfig, *, batch_size: int | None = None, dropout: bool = True) -> Chain:
    """Return the model for one microbatch.

    Args:
        cfg: the run.
        batch_size: sequences; None for those of a microbatch.
        dropout: False for evaluation: the same leaves, and nothing is dropped.
    """
    model = cfg.model if dropout else replace(cfg.model, dropout=0.0, attention_dropout=0.0)
    return gpt(model, batch_size=batch_size or cfg.train.microbatch, dtype=DTYPES[cfg.dtype])


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
