"""megatree: train large transformers in parallel; models are pure functions, layouts are data."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatree import functional
    from megatree.functional.annotate import as_partial, shard
    from megatree.functional.chain import Chain, Segment, Stack
    from megatree.functional.local_map import Out, local_map
    from megatree.functional.op import op
    from megatree.functional.param import Array, Param, init, normal, ones, zeros
    from megatree.models.gpt import gpt
    from megatree.models.gpt_config import GPTConfig
    from megatree.models.moe import moe
    from megatree.models.moe_config import MoEConfig
    from megatree.parallel.comm import OneDevice
    from megatree.parallel.context import AllGather, Hierarchical, Ring, Ulysses
    from megatree.parallel.errors import ShardingError
    from megatree.parallel.layout import Layout, Rules
    from megatree.parallel.lower import lower
    from megatree.parallel.mesh import Mesh
    from megatree.parallel.model import lower_model
    from megatree.parallel.order import Zigzag
    from megatree.parallel.placement import Placement
    from megatree.parallel.plan import H100_SXM, Device, Estimate, Plan, estimate, plan
    from megatree.parallel.precision import Precision
    from megatree.parallel.rulecheck import rulecheck
    from megatree.parallel.schedule import (
        Schedule,
        draw,
        gpipe,
        interleaved,
        one_f_one_b,
        plot,
        timeline,
        validate,
        zero_bubble_h1,
        zero_bubble_v,
    )
    from megatree.parallel.simulate import simulate
    from megatree.parallel.storage import Storage
    from megatree.runtime.collectives import ProcessComm
    from megatree.runtime.debug import debug
    from megatree.runtime.gradients import value_and_grad
    from megatree.runtime.jax.arrays import arrays_from_jax, arrays_to_jax
    from megatree.runtime.jax.from_jax import from_jax
    from megatree.runtime.jax.to_jax import to_jax
    from megatree.runtime.lr_schedule import lr_schedule
    from megatree.runtime.optimizers import LeafRule, adamw, by_path, lion, muon, sgd, with_ema
    from megatree.runtime.pieces import load, save
    from megatree.runtime.processes import launch, world_of_group
    from megatree.runtime.step import train_step
    from megatree.runtime.verify import verify

__version__ = "0.1.0"

_SCHEDULE = "megatree.parallel.schedule"
# Public name -> its module. Loaded at first use, so that `megatree --help` needs no torch.
_HOMES = {
    "functional": "megatree.functional",
    **dict.fromkeys(["as_partial", "shard"], "megatree.functional.annotate"),
    **dict.fromkeys(["Chain", "Segment", "Stack"], "megatree.functional.chain"),
    **dict.fromkeys(["Out", "local_map"], "megatree.functional.local_map"),
    "op": "megatree.functional.op",
    **dict.fromkeys(
        ["Array", "Param", "init", "normal", "ones", "zeros"], "megatree.functional.param"
    ),
    "GPTConfig": "megatree.models.gpt_config",
    "gpt": "megatree.models.gpt",
    "MoEConfig": "megatree.models.moe_config",
    "moe": "megatree.models.moe",
    "OneDevice": "megatree.parallel.comm",
    **dict.fromkeys(["AllGather", "Hierarchical", "Ring", "Ulysses"], "megatree.parallel.context"),
    "Zigzag": "megatree.parallel.order",
    "ShardingError": "megatree.parallel.errors",
    **dict.fromkeys(["Layout", "Rules"], "megatree.parallel.layout"),
    "lower": "megatree.parallel.lower",
    "Mesh": "megatree.parallel.mesh",
    "lower_model": "megatree.parallel.model",
    "Placement": "megatree.parallel.placement",
    **dict.fromkeys(
        ["H100_SXM", "Device", "Estimate", "Plan", "estimate", "plan"], "megatree.parallel.plan"
    ),
    "Precision": "megatree.parallel.precision",
    "rulecheck": "megatree.parallel.rulecheck",
    **dict.fromkeys(["Schedule", "draw", "plot", "timeline", "validate"], _SCHEDULE),
    **dict.fromkeys(["gpipe", "interleaved", "one_f_one_b"], _SCHEDULE),
    **dict.fromkeys(["zero_bubble_h1", "zero_bubble_v"], _SCHEDULE),
    "simulate": "megatree.parallel.simulate",
    "Storage": "megatree.parallel.storage",
    "lr_schedule": "megatree.runtime.lr_schedule",
    **dict.fromkeys(
        ["LeafRule", "adamw", "by_path", "lion", "muon", "sgd", "with_ema"],
        "megatree.runtime.optimizers",
    ),
    "ProcessComm": "megatree.runtime.collectives",
    "debug": "megatree.runtime.debug",
    "value_and_grad": "megatree.runtime.gradients",
    **dict.fromkeys(["arrays_from_jax", "arrays_to_jax"], "megatree.runtime.jax.arrays"),
    "from_jax": "megatree.runtime.jax.from_jax",
    "to_jax": "megatree.runtime.jax.to_jax",
    **dict.fromkeys(["load", "save"], "megatree.runtime.pieces"),
    **dict.fromkeys(["launch", "world_of_group"], "megatree.runtime.processes"),
    "train_step": "megatree.runtime.step",
    "verify": "megatree.runtime.verify",
}

__all__ = [
    "H100_SXM",
    "AllGather",
    "Array",
    "Chain",
    "Device",
    "Estimate",
    "GPTConfig",
    "Hierarchical",
    "Layout",
    "LeafRule",
    "Mesh",
    "MoEConfig",
    "OneDevice",
    "Out",
    "Param",
    "Placement",
    "Plan",
    "Precision",
    "ProcessComm",
    "Ring",
    "Rules",
    "Schedule",
    "Segment",
    "ShardingError",
    "Stack",
    "Storage",
    "Ulysses",
    "Zigzag",
    "adamw",
    "arrays_from_jax",
    "arrays_to_jax",
    "as_partial",
    "by_path",
    "debug",
    "draw",
    "estimate",
    "from_jax",
    "functional",
    "gpipe",
    "gpt",
    "init",
    "interleaved",
    "launch",
    "lion",
    "load",
    "local_map",
    "lower",
    "lower_model",
    "lr_schedule",
    "moe",
    "muon",
    "normal",
    "one_f_one_b",
    "ones",
    "op",
    "plan",
    "plot",
    "rulecheck",
    "save",
    "sgd",
    "shard",
    "simulate",
    "timeline",
    "to_jax",
    "train_step",
    "validate",
    "value_and_grad",
    "verify",
    "with_ema",
    "world_of_group",
    "zero_bubble_h1",
    "zero_bubble_v",
    "zeros",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megatree' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name == "functional" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
