"""From a config to the values it names: layout, model, optimizer."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import partial

import torch

from megatree.functional.chain import Chain
from megatree.functional.tree import flatten_with_names
from megatree.models.decoder import decoder
from megatree.parallel.context import AllGather, Ring, Ulysses
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.loss_scale import DynamicLossScale, LossScale, StaticLossScale
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.order import Zigzag
from megatree.parallel.placement import Placement
from megatree.parallel.precision import Precision
from megatree.parallel.remat import Remat
from megatree.parallel.schedule import (
    gpipe,
    interleaved,
    one_f_one_b,
    validate,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.parallel.storage import Storage
from megatree.recipes.config import (
    ContextConfig,
    MeshConfig,
    PipelineConfig,
    RematConfig,
    RunConfig,
    StorageConfig,
    data_axes,
)
from megatree.runtime.lr_schedule import DecaySchedule, Steps
from megatree.runtime.optimizers import (
    LeafRule,
    Optimizer,
    Schedule,
    adamw,
    by_path,
    lion,
    muon,
    sgd,
    with_ema,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

LOWERINGS = {"all-gather": AllGather(), "ring": Ring(), "all-to-all": Ulysses()}

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
    context: ContextConfig | None = None,
    storage: StorageConfig | None = None,
    remat: RematConfig | None = None,
) -> Layout:
    """Return a mesh, its rules (those that cut nothing there are left out), its pipeline, how its
    attention runs over a cut sequence, what is stored cut and what is computed again.
    """
    cuts = {
        axis: tuple(mesh_axis for mesh_axis in cut_by if mesh.sizes.get(mesh_axis, 1) > 1)
        for axis, cut_by in rules.items()
    }
    made = Rules(**{axis: cut_by for axis, cut_by in cuts.items() if cut_by})
    order = None
    if mesh.cp > 1:
        context = context or ContextConfig()
        made = made.updated(lower={"attention": LOWERINGS[context.attention]})
        order = Zigzag() if context.zigzag else None
    levels = (storage or StorageConfig()).axes(data_axes(rules, mesh))
    more = {
        "order": order,
        "storage": Storage(*(tuple(a for a in axes if a in mesh.sizes) for axes in levels)),
        "remat": Remat(**asdict(remat)) if remat else Remat(),
    }
    if mesh.pp == 1:
        return Layout(Mesh(**mesh.sizes), made, **more)
    pipeline = pipeline or PipelineConfig()
    if pipeline.schedule == "interleaved":
        schedule = partial(interleaved, num_virtual=pipeline.virtual)
    else:
        schedule = SCHEDULES[pipeline.schedule]
    layers = pipeline.layers_per_stage
    placement = Placement(layers_per_stage=layers) if layers else None
    return Layout(Mesh(**mesh.sizes), made, placement, schedule, **more)


def layout_of_run(cfg: RunConfig) -> Layout:
    """Return the layout of a run."""
    return layout_of(cfg.mesh, cfg.rules, cfg.pipeline, cfg.context, cfg.storage, cfg.remat)


def check_pipeline(cfg: RunConfig) -> None:
    """Refuse stages or a schedule that cannot run, before any process starts.

    Raises:
        ValueError: the message shows the stages or the schedule, and marks what is wrong.
    """
    if cfg.mesh.pp > 1:
        layout = layout_of_run(cfg)
        validate(layout.schedule_for(cfg.train.global_batch // cfg.train.microbatch))
        lower_model(model_of(cfg), layout)


def model_of(cfg: RunConfig, *, entries: Collection[str] | None = None) -> Chain:
    """Return the model for one microbatch; it reads the entries of the run's data, or of others."""
    return decoder(
        cfg.model,
        batch_size=cfg.train.microbatch,
        dtype=DTYPES[cfg.dtype],
        entries=cfg.data.entries if entries is None else entries,
    )


def schedule_of(cfg: RunConfig) -> Schedule:
    """Return the learning rate as a function of the number of updates made."""
    opt = cfg.optimizer
    shape = opt.schedule
    if opt.warmup_steps:
        shape = replace(shape, warmup_steps=opt.warmup_steps)
    return shape.resolve(opt.lr, opt.min_lr, cfg.train.steps).by_step(cfg.train.batches.consumed)


def optimizer_of(cfg: RunConfig) -> Optimizer:
    """Return the optimizer under its schedules."""
    opt = cfg.optimizer
    lr, moments = schedule_of(cfg), DTYPES[opt.moments]
    decay: float | Schedule = opt.weight_decay
    if opt.end_weight_decay is not None:
        decay = DecaySchedule(
            shape="cosine",
            start=opt.weight_decay,
            end=opt.end_weight_decay,
            length=Steps(cfg.train.steps),
        ).by_step()
    adam = partial(adamw, lr, betas=opt.betas, eps=opt.eps, weight_decay=decay, moments=moments)
    match opt.kind:
        case "adamw":
            made = adam()
        case "sgd":
            made = sgd(lr, momentum=opt.momentum, weight_decay=decay, moments=moments)
        case "lion":
            made = lion(lr, betas=opt.betas, weight_decay=decay, moments=moments)
        case "muon":
            made = muon(
                lr, others=adam(), momentum=opt.momentum, weight_decay=decay, moments=moments
            )
    return with_ema(made, opt.ema) if opt.ema else made


def rules_of(cfg: RunConfig, model: Chain) -> Callable[[str, int], LeafRule]:
    """Return what the optimizer is told of every leaf.

    Raises:
        ValueError: a pattern matches no leaf.
    """
    opt = cfg.optimizer
    by_path(dict.fromkeys([*opt.lr_of, *opt.no_decay], LeafRule())).check(
        flatten_with_names(model.params)[0]
    )

    def rule(path: str, num_dims: int) -> LeafRule:
        lr = next((x for pattern, x in opt.lr_of.items() if fnmatchcase(path, pattern)), 1.0)
        decays = num_dims >= 2 and not any(fnmatchcase(path, p) for p in opt.no_decay)
        matrix = opt.kind == "muon" and num_dims >= 2 and path.startswith("blocks.")
        out = matrix and path.rpartition(".")[2] in ("wo", "w_down", "shared_down")
        return LeafRule(lr=lr, decay=float(decays), matrix=matrix, columns_are_inputs=not out)

    return rule


def precision_of(cfg: RunConfig) -> Precision:
    """Return what the step stores, adds up and sends in which dtype."""
    said, wide = cfg.precision, cfg.dtype == "float64"
    scale: LossScale | None = None
    if said.loss_scale == "dynamic" or (said.loss_scale == "auto" and cfg.dtype == "float16"):
        scale = DynamicLossScale()
    elif said.loss_scale not in ("auto", "none"):
        scale = StaticLossScale(scale=float(said.loss_scale))
    return Precision(
        grads=None if wide or said.grads == "float32" else DTYPES[said.grads],
        reduce=DTYPES[said.reduce] if said.reduce else None,
        master=said.master,
        rounding=said.rounding,
        main_grads=said.grads == "float16",
        loss_scale=scale,
    )


def moments_of(cfg: RunConfig) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the optimizer's states per parameter, for plans."""
    moments = DTYPES[cfg.optimizer.moments]
    count = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1}[cfg.optimizer.kind]
    average = (torch.float32,) if cfg.optimizer.ema else ()
    return (moments,) * count + average
