"""The model that a config names: dense or with experts, predicting one token or more."""

from collections.abc import Collection
from dataclasses import replace

import torch

from megatree.functional.chain import Chain
from megatree.models.gpt import gpt
from megatree.models.gpt_config import GPTConfig
from megatree.models.moe import moe
from megatree.models.moe_config import MoEConfig
from megatree.models.mtp import with_mtp


def decoder(
    cfg: GPTConfig,
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    entries: Collection[str] = (),
) -> Chain:
    """Declare the model of a config: `gpt`, or `moe` for a MoEConfig, and `with_mtp` behind it.

    Args:
        cfg: sizes and choices.
        batch_size, dtype, entries: see `gpt`.
    """
    single = replace(cfg, mtp=None)
    if isinstance(single, MoEConfig):
        made = moe(single, batch_size=batch_size, dtype=dtype, entries=entries)
    else:
        made = gpt(single, batch_size=batch_size, dtype=dtype, entries=entries)
    return made if cfg.mtp is None else with_mtp(made, cfg)
