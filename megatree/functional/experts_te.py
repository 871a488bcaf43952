"""Products of experts by Transformer Engine's grouped linear layer, over weights of our own."""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def why_not(rows: Tensor) -> str:
    """Return why Transformer Engine does not multiply these rows, or nothing (where one plans)."""
    if rows.is_meta:
        return ""
    if find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    return "" if rows.is_cuda else f"it works on GPUs, not on {rows.device.type}"


@torch.compiler.disable  # it does the same by itself
def product(rows: Tensor, weights: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Multiply the rows of every expert, `counts` of them, with its weight [out, in]."""
    width_out, width_in = weights[0].shape
    layer = _layer(len(weights), width_in, width_out, rows.dtype)
    named = {f"weight{i}": w.contiguous() for i, w in enumerate(weights)}
    return torch.func.functional_call(layer, named, (rows, list(counts)))


@lru_cache
def _layer(num_experts: int, width_in: int, width_out: int, dtype: torch.dtype) -> Any:
    """Return a layer without memory: it is called with weights that it is given."""
    return import_module("transformer_engine.pytorch").GroupedLinear(
        num_experts, width_in, width_out, bias=False, params_dtype=dtype, device="meta"
    )
