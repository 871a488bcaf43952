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
    from megatree.models.gpt import GPTConfig, gpt
    from megatree.parallel.comm import OneDevice
    from megatree.parallel.errors import ShardingError
    from megatree.parallel.layout import Layout, Rules
    from megatree.parallel.lower import lower
    from megatree.parallel.mesh import Mesh
    from megatree.parallel.model import lower_model
    from megatree.parallel.rulecheck import rulecheck
    from megatree.parallel.simulate import simulate
    from megatree.runtime.adamw import adamw
    from megatree.runtime.collectives import ProcessComm
    from megatree.runtime.debug import debug
    from megatree.runtime.gradients import value_and_grad
    from megatree.runtime.jax.arrays import arrays_from_jax, arrays_to_jax
    from megatree.runtime.jax.from_jax import from_jax
    from megatree.runtime.jax.to_jax import to_jax
    from megatree.runtime.pieces import load, save
    from megatree.runtime.processes import launch, world_of_group
    from megatree.runtime.step import train_step
    from megatree.runtime.verify import verify

__version__ = "0.1.0"

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
    **dict.fromkeys(["GPTConfig", "gpt"], "megatree.models.gpt"),
    "OneDevice": "megatree.parallel.comm",
    "ShardingError": "megatree.parallel.errors",
    **dict.fromkeys(["Layout", "Rules"], "megatree.parallel.layout"),
    "lower": "megatree.parallel.lower",
    "Mesh": "megatree.parallel.mesh",
    "lower_model": "megatree.parallel.model",
    "rulecheck": "megatree.parallel.rulecheck",
    "simulate": "megatree.parallel.simulate",
    "adamw": "megatree.runtime.adamw",
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
    "Array",
    "Chain",
    "GPTConfig",
    "Layout",
    "Mesh",
    "OneDevice",
    "Out",
    "Param",
    "ProcessComm",
    "Rules",
    "Segment",
    "ShardingError",
    "Stack",
    "adamw",
    "arrays_from_jax",
    "arrays_to_jax",
    "as_partial",
    "debug",
    "from_jax",
    "functional",
    "gpt",
    "init",
    "launch",
    "load",
    "local_map",
    "lower",
    "lower_model",
    "normal",
    "ones",
    "op",
    "rulecheck",
    "save",
    "shard",
    "simulate",
    "to_jax",
    "train_step",
    "value_and_grad",
    "verify",
    "world_of_group",
    "zeros",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megatree' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name == "functional" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
