"""Configs of runs, and the whole jobs that they describe."""

from megatree.recipes.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    megatron_rules,
)
from megatree.recipes.presets import RECIPES
from megatree.recipes.saved import load_config

__all__ = [
    "RECIPES",
    "CheckpointConfig",
    "DataConfig",
    "MeshConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "megatron_rules",
]
