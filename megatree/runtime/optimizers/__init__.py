"""Optimizers as (init, update) over flat buffers, and which leaf gets which multipliers."""

from megatree.runtime.optimizers.adamw import adamw
from megatree.runtime.optimizers.clip import clip_value
from megatree.runtime.optimizers.ema import with_ema
from megatree.runtime.optimizers.lion import lion
from megatree.runtime.optimizers.muon import by_aspect, like_adam, muon, orthogonalize
from megatree.runtime.optimizers.optimizer import (
    Buffers,
    GroupRule,
    Matrix,
    Optimizer,
    Schedule,
    State,
)
from megatree.runtime.optimizers.rules import ByPath, LeafRule, by_path, decay_matrices
from megatree.runtime.optimizers.sgd import sgd

__all__ = [
    "Buffers",
    "ByPath",
    "GroupRule",
    "LeafRule",
    "Matrix",
    "Optimizer",
    "Schedule",
    "State",
    "adamw",
    "by_aspect",
    "by_path",
    "clip_value",
    "decay_matrices",
    "like_adam",
    "lion",
    "muon",
    "orthogonalize",
    "sgd",
    "with_ema",
]
