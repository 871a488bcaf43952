"""What Megatron keeps of an optimizer beside its tensors, from and to our training state."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatree.functional.chain import Chain
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.formats.arrays import Array
from megatree.io.formats.folded import Entry
from megatree.io.formats.megatron_state import STATE
from megatree.models.names import Source
from megatree.recipes.name_map import foreign_from
from megatree.recipes.saved import from_plain

KEPT = "megatron"
"""Key of the training state under which groups and schedule of Megatron are kept as they are."""

_DECAYS = {
    "constant": "constant", "linear": "linear", "cosine": "cosine",
    "inverse_square_root": "inverse-square-root", "wsd": "WSD",
}  # fmt: skip
# What torch's AdamW and Transformer Engine's have in every group.
_GROUP: Mapping[str, Any] = {
    "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "default_config": True,
    "bias_correction": True, "amsgrad": False, "maximize": False, "foreach": None,
    "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip


def to_extra(
    iteration: int,
    updates: int | None,
    groups: list[dict[str, Any]],
    scheduler: Mapping[str, Any],
    args: Mapping[str, Any],
) -> dict[str, Any]:
    """Return our training state of what a checkpoint of Megatron says.

    Args:
        iteration: steps made.
        updates: those of them that changed the weights, if the optimizer says so.
        groups: of the optimizer, without parameters.
        scheduler: state of the learning rate's schedule.
        args: arguments of the run.
    """
    out: dict[str, Any] = {"step": iteration}
    if updates is not None:
        out["skipped"] = max(0, iteration - updates)
    if isinstance(args.get("consumed_train_samples"), int):
        out["consumed"] = args["consumed_train_samples"]
    kept = {"param_groups": groups, "opt_param_scheduler": dict(scheduler)}
    kept = {key: _stored(value) for key, value in kept.items() if value}
    return {**out, KEPT: kept} if kept else out


def _stored(value: Any) -> Any:
    """Return plain data as a checkpoint keeps it: no tuples, no dtypes."""
    if isinstance(value, Mapping):
        return {str(key): _stored(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_stored(item) for item in value]
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return value.item() if isinstance(value, torch.Tensor) else value


def beside(extra: Mapping[str, Any], place: str, *, optimizer: bool) -> dict[str, Any]:
    """Return what an archive of Megatron has beside tensors: the optimizer's groups, the schedule.

    Args:
        extra: our training state.
        place: for errors.
        optimizer: whether its tensors are written.

    Raises:
        ValueError: nobody says how the moments were made.
    """
    if not optimizer:
        return {}
    kept = extra.get(KEPT) or {}
    told = extra.get("config")
    groups, scheduler = kept.get("param_groups"), kept.get("opt_param_scheduler")
    if told is None and not groups:
        raise ValueError(
            f"{place}: has moments, and does not say of which optimizer. "
            "Leave them out with --weights-only."
        )
    if not groups:
        groups, scheduler = _from_config(extra, place)
    step = int(extra.get("step", 0)) - int(extra.get("skipped", 0))
    groups = [{**_GROUP, **g, "betas": tuple(g["betas"]), "step": step} for g in groups]
    out: dict[str, Any] = {"optimizer": {"optimizer": {"param_groups": groups}}}
    return {**out, "opt_param_scheduler": dict(scheduler)} if scheduler else out


def _from_config(
    extra: Mapping[str, Any], place: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return groups and schedule of a run of ours, which Megatron counts in samples."""
    cfg = from_plain(extra["config"], f"{place}: config")
    opt, shape, samples = cfg.optimizer, cfg.optimizer.schedule, cfg.train.batches.consumed
    if opt.kind != "adamw":
        raise ValueError(
            f"{place}: its optimizer is {opt.kind}, and Megatron's checkpoints have moments of "
            "Adam. Leave them out with --weights-only."
        )
    decay = shape.samples or samples(shape.steps or cfg.train.steps)
    warmup = shape.warmup_samples or samples(opt.warmup_steps or shape.warmup_steps)
    warmup = warmup or int(shape.warmup_fraction * decay)
    lr = (extra.get("schedule") or {}).get("lr", opt.lr)
    group = {
        "lr": lr, "max_lr": opt.lr, "min_lr": opt.min_lr, "betas": opt.betas, "eps": opt.eps,
        "weight_decay": opt.weight_decay,
    }  # fmt: skip
    groups = [
        {**group, "wd_mult": 1.0},
        {**group, "wd_mult": 0.0, "weight_decay": 0.0},
    ]
    end = opt.weight_decay if opt.end_weight_decay is None else opt.end_weight_decay
    return groups, {
        "max_lr": opt.lr, "min_lr": opt.min_lr, "lr_warmup_steps": warmup,
        "num_steps": int(extra.get("consumed", 0)), "lr_decay_style": _DECAYS[shape.decay],
        "lr_decay_steps": decay, "start_wd": opt.weight_decay, "end_wd": end,
        "wd_incr_style": "constant" if end == opt.weight_decay else "cosine",
        "wd_incr_steps": samples(cfg.train.steps),
    }  # fmt: skip


def state_entries(
    sources: tuple[Source, ...],
    model: Chain,
    arrays: Mapping[str, Array],
    *,
    vocab: int | None,
) -> dict[str, Entry]:
    """Return Adam's state as Megatron names it, in float32; nothing if there is none of Adam.

    Args:
        sources: Megatron's names.
        model: declares the leaves.
        arrays: ours, by path; masters that are not there are made from the parameters.
        vocab: rows that tables have there.
    """
    leaves = {path.removeprefix("params.") for path in arrays if path.startswith("params.")}
    held = {
        entry: all(f"opt.{entry}.{leaf}" in arrays for leaf in leaves)
        for entry in ("m", "v", "master")
    }
    if not leaves or not (held["m"] and held["v"]):
        return {}
    prefixes = {
        "param": "opt.master" if held["master"] else "params",
        "exp_avg": "opt.m",
        "exp_avg_sq": "opt.v",
    }
    out = {}
    for key, prefix in prefixes.items():
        found = foreign_from(sources, model, arrays, prefix=prefix, vocab=vocab)
        for name, entry in found.items():
            wide = replace(entry.array, dtype=torch.float32)
            out[f"{STATE}{key}.{name}"] = replace(entry, array=wide)
    return out
