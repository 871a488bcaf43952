"""What a rank really holds between a forward and its backward: storages that are alive."""

from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatree.runtime import executor, offload
from megatree.runtime.offload import Transfers


class Made(TorchDispatchMode):
    """Notes every storage that an operation makes; one that it is given is somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: dict[int, StorageWeakRef] = {}
        self.sizes: dict[int, int] = {}

    def note(self, tree: Any, *, made: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.refs:
                self.refs[key] = StorageWeakRef(x.untyped_storage())  # so no address is used twice
                self.sizes[key] = x.untyped_storage().nbytes() if made else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self.note(out, made=True)
        return out

    def alive(self) -> dict[int, int]:
        """Return the bytes of the storages that were made and are not gone."""
        return {key: self.sizes[key] for key, ref in self.refs.items() if not ref.expired()}


class Live:
    """Measures steps of one microbatch and one stage a rank: bytes on the device, on the host.

    Both by rank, as every rank's first backward begins.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here: dict[int, int] = {}
        self.away: dict[int, int] = {}
        made: dict[int, Made] = {}
        hosts: dict[int, StorageWeakRef] = {}
        forward, backward = executor._Step.forward, executor._Step.backward
        to_host = Transfers.to_host

        def noted_forward(step: Any, action: Any) -> None:
            with made.setdefault(id(step), Made()):
                forward(step, action)

        def noted_to_host(self: Transfers, data: Tensor) -> Tensor:
            host = to_host(self, data)
            hosts[host.untyped_storage()._cdata] = StorageWeakRef(host.untyped_storage())
            return host

        def noted_backward(step: Any, action: Any) -> None:
            alive = made[id(step)].alive()
            for live in step.live.values():  # what another rank made
                for x in live.carry_in:
                    alive[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            rank = getattr(step.comm, "rank", 0)
            self.away[rank] = sum(n for key, n in alive.items() if key in hosts)
            self.here[rank] = sum(alive.values()) - self.away[rank]
            backward(step, action)

        monkeypatch.setattr(executor._Step, "forward", noted_forward)
        monkeypatch.setattr(executor._Step, "backward", noted_backward)
        monkeypatch.setattr(offload.Transfers, "to_host", noted_to_host)
