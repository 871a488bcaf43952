"""What a step costs: tokens and FLOPs a second, their part of a device's peak, memory."""

import math
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch

from megatree.functional.param import logical_shape
from megatree.parallel.model import ModelProgram
from megatree.parallel.plan.flops import forward_flops

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Part of a GPU's name -> datasheet rate of dense bfloat16 products, FLOP/s."""


@dataclass(frozen=True, kw_only=True)
class Meter:
    """Turns the time of steps into rates.

    Args:
        tokens: of a microbatch over all ranks.
        flops: of the model, forward and backward of a microbatch: products and attention (its
            causal half), without recomputation.
        num_ranks: devices that share the work.
        device: of this rank.
        peak: FLOP/s of one device that MFU is measured against; None if it is not known.
    """

    tokens: int
    flops: int
    num_ranks: int
    device: torch.device
    peak: float | None = None

    def rates(self, num_microbatches: int, seconds: float) -> dict[str, Any]:
        """Return what so many microbatches in so many seconds come to.

        `model_flops_per_s` is that of one device, `mfu` its part of the peak.
        """
        rate = num_microbatches * self.flops / seconds / self.num_ranks
        return {
            "tokens_per_s": num_microbatches * self.tokens / seconds,
            "model_flops_per_s": rate,
            "mfu": rate / self.peak if self.peak else None,
        }

    def memory(self) -> int:
        """Return the most bytes that this rank has had at a time: of its GPU, or of its process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def meter(program: ModelProgram, device: torch.device, peak: float | None = None) -> Meter:
    """Return the meter of a lowered model.

    Args:
        program: the model.
        device: of this rank.
        peak: FLOP/s of one device; None for what is known of a GPU by its name.
    """
    first = next(iter(program.model.batch.values()))
    tokens = math.prod(logical_shape(first, program.model.sizes, "batch"))
    flops = sum(
        3 * forward_flops(program.units[name].program, local=False) for name, _, _ in program.order
    )
    return Meter(
        tokens=tokens,
        flops=flops,
        num_ranks=program.layout.mesh.num_ranks,
        device=device,
        peak=known_peak(device) if peak is None else peak,
    )


def known_peak(device: torch.device) -> float | None:
    """Return the datasheet rate of a device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)
