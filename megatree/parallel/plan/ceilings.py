"""What a step's work takes at a device's rates, kind by kind: what a profile is held against."""

import math
from collections.abc import Iterable

import torch

from megatree.parallel.model import ModelProgram
from megatree.parallel.plan.device import A100_SXM, H100_SXM, Device
from megatree.parallel.plan.estimate import collective_seconds
from megatree.parallel.plan.plan import Plan
from megatree.parallel.types import ShardType

FUSED_TRAFFIC = 1.73
"""Bytes that one fused pass per elementwise stage moves, per byte that the backward keeps: measured
on an H100, 34.7 ms of a step of llama-1b that keeps 61 GB."""

LOGIT_PASSES = 3
"""Times that a loss moves its logits: read for statistics, read again, their gradient written."""

_LOSSES = ("cross_entropy", "linear_cross_entropy")
_NAMES = {"H100 80GB HBM3": H100_SXM, "A100-SXM": A100_SXM}
"""Part of a GPU's name, as CUDA gives it -> device."""


def device_of(name: str) -> Device | None:
    """Return what is known of a GPU by its name, None for others.

    >>> device_of("NVIDIA H100 80GB HBM3") is H100_SXM
    True
    """
    return next((device for part, device in _NAMES.items() if part in name), None)


def ceilings(
    plan: Plan, program: ModelProgram, device: Device, dtype: torch.dtype
) -> dict[str, float]:
    """Return kind of work -> seconds per step on the busiest rank, at the device's rates.

    Products and attention by their FLOPs, recomputation included, at sustained rates; elementwise
    work by one fused pass per stage; the loss by its logits; the update by every number that it
    reads and writes; communication by bytes over its links, as if nothing hid it. Rates of products
    are those of half precision, so a model in another dtype has no ceiling there.

    Args:
        plan: of the run.
        program: the same model, lowered.
        device: of every rank.
        dtype: of products.
    """
    stage = max(plan.stages, key=lambda s: s.flops)
    micro, bandwidth = plan.num_microbatches, device.memory_bandwidth
    rows = _logit_bytes(program, stage.stages)
    found = {
        "norm/elementwise": micro * stage.plain_bytes * FUSED_TRAFFIC / bandwidth,
        "loss": micro * LOGIT_PASSES * rows / bandwidth,
        # Parameters are written and gradients read; state (masters are part of it) is both.
        "optimizer": (stage.parameter_bytes + stage.gradient_bytes + 2 * stage.optimizer_bytes)
        / bandwidth,
    }
    if dtype in (torch.bfloat16, torch.float16):
        found["GEMM"] = micro * (stage.flops - stage.attention_flops) / device.product_rate
        found["attention"] = micro * stage.attention_flops / device.attention_rate
    if plan.num_ranks > 1:
        found["communication"] = sum(
            collective_seconds(c, plan, device) * c.count for c in plan.collectives
        )
    return found


def _logit_bytes(program: ModelProgram, stages: Iterable[int]) -> int:
    """Return the bytes of the logits of a microbatch on one rank."""
    held, sizes = set(stages), program.layout.sizes
    names = [n for (n, _, _), s in zip(program.order, program.stages, strict=True) if s in held]
    total = 0
    for name in names:
        for node in program.units[name].program.graph.nodes:
            if node.meta.get("op") not in _LOSSES:
                continue
            types: list[ShardType] = [n.meta["type"] for n in node.all_input_nodes]
            shape = types[0].local_shape(sizes)
            if node.meta["op"] == "linear_cross_entropy":
                shape = (*shape[:-1], types[1].local_shape(sizes)[0])
            total += math.prod(shape) * types[0].dtype.itemsize
    return total
