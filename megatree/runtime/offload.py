"""Activations in host memory between forward and backward."""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatree.parallel.again import Keep


class Transfers:
    """Copies between a device and pinned host memory, in order, beside the compute.

    On a CPU they are plain copies: the same values through the same code.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _beside(self) -> AbstractContextManager[Any]:
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def to_host(self, data: Tensor) -> Tensor:
        """Start a copy to the host; the caller may forget `data` at once."""
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=self.stream is not None)
        with self._beside():
            host.copy_(data, non_blocking=True)
        if self.stream is not None:
            data.record_stream(self.stream)
        return host

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """Start a copy to the device; `wait` for it before use."""
        with self._beside():
            data = host.to(self.device, non_blocking=True, copy=True)
            return data, None if self.stream is None else self.stream.record_event()

    def wait(self, data: Tensor, event: Any) -> None:
        """Let the current stream wait for a copy."""
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            data.record_stream(stream)


class _Away:
    """A storage in host memory; on the device again from `fetch` until its last user is gone."""

    def __init__(self, transfers: Transfers, x: Tensor) -> None:
        self.transfers = transfers
        data = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
        self.host = transfers.to_host(data)
        self.here: tuple[Tensor, Any] | None = None

    def fetch(self) -> None:
        if self.here is None:
            self.here = self.transfers.to_device(self.host)

    def read(self) -> Tensor:
        self.fetch()
        assert self.here is not None
        self.transfers.wait(*self.here)
        return self.here[0]


class _View(NamedTuple):
    """A tensor over a storage that is away."""

    away: _Away
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Offload(Keep):
    """Keeps what a layer saves in host memory; its first use starts the layer before.

    Args:
        transfers: of the device.
        keep: how what does not go waits.
        before: of the layer before this, whose backward comes after.
        stays: tensors that do not go, as somebody holds them anyway.
    """

    def __init__(
        self, transfers: Transfers, keep: Keep, before: "Offload | None", stays: Sequence[Tensor]
    ) -> None:
        self.transfers, self.keep, self.before = transfers, keep, before
        self._stays: set[int] = set()
        self._away: dict[int, tuple[StorageWeakRef, weakref.ref[_Away]]] = {}
        self.leave(*stays)

    def leave(self, *tensors: Tensor) -> None:
        """Let these stay where they are."""
        self._stays |= {x.untyped_storage()._cdata for x in tensors}

    def pack(self, x: Tensor) -> Any:
        """Start to move a tensor's storage, once for all views of it."""
        kept = self.keep.pack(x)
        key = x.untyped_storage()._cdata
        if not isinstance(kept, Tensor) or key in self._stays or x.dim() == 0:
            return kept
        away = self._away[key][1]() if key in self._away else None
        if away is None:
            away = _Away(self.transfers, x)
            # While the first reference lives, no other storage gets the same address.
            self._away[key] = StorageWeakRef(x.untyped_storage()), weakref.ref(away)
        return _View(away, x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))

    def unpack(self, kept: Any) -> Tensor:
        """Return the tensor, with its storage on the device again."""
        if not isinstance(kept, _View):
            return self.keep.unpack(kept)
        self.fetch()
        if self.before is not None:
            self.before.fetch()
        data = kept.away.read()
        view = torch.empty(0, dtype=kept.dtype, device=data.device)
        return view.set_(data.untyped_storage(), kept.offset, kept.shape, kept.stride)

    def fetch(self) -> None:
        """Start to bring back all that is still needed."""
        for _, ref in self._away.values():
            if (away := ref()) is not None:
                away.fetch()
