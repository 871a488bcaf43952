"""Numbers on their way from the device: whoever reads them waits for no work after them."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Later:
    """Scalars of the device as they are now, to be read when they have arrived.

    `Tensor.item` waits for all that was queued before the call; this for what was queued before
    the numbers were asked for, so a step can be read while the next one runs.

    Args:
        named: scalars of one device, at least one.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.names = tuple(named)
        packed = torch.stack([x.detach().double() for x in named.values()])
        self._arrived: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            packed = host.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._host = packed

    def read(self) -> dict[str, float]:
        """Return name -> number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self.names, self._host.tolist(), strict=True))
