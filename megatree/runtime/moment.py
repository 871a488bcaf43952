"""Moments of a device: when it had done what was asked of it before."""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moment:
    """A point in a device's work; on a CPU, which does what it is asked at once, in time.

    The host runs ahead of a GPU, by as many kernels as its queue holds, so the host's clock says
    neither when a step ended nor how long it took.
    """

    event: torch.cuda.Event | None
    clock: float

    @classmethod
    def now(cls, device: torch.device) -> "Moment":
        """Mark the moment at which all that was asked so far is done; waits for nothing."""
        if device.type != "cuda":
            return cls(None, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(event, time.perf_counter())

    def since(self, earlier: "Moment") -> float:
        """Return the seconds between two moments of a device, both of which have passed."""
        if self.event is None or earlier.event is None:
            return self.clock - earlier.clock
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3
