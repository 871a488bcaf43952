"""Parameters between uses, and how they come together for one: storage -> compute as a gather."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatree.functional.tree import flatten_with_names
from megatree.parallel.comm import RankComm
from megatree.parallel.packing import Group, views

Bucket = tuple[str, int]
"""(group name, row)."""

Wait = Callable[[], Tensor]


class Weights:
    """A rank's parameters, in place: rows of whole leaves, or packed rows where storage cuts them.

    Args:
        comm: this rank's collectives.
        groups: the plan of the buffers.
    """

    def __init__(self, comm: RankComm, groups: tuple[Group, ...]) -> None:
        self.comm, self.groups = comm, groups
        self.by_name = {group.name: group for group in groups}
        self.stored: dict[str, Tensor] = {
            group.name: group.allocate(group.dtype, comm.device, level="params") for group in groups
        }
        self._arriving: dict[Bucket, Callable[[], None]] = {}
        self.version = 0
        """Number of changes: what was gathered before one is of old weights."""
        self._readers: list[Callable[[], None]] = []

    def lend(self, settle: Callable[[], None]) -> None:
        """Let a thread beside the training read these buffers, and all that an update changes with
        them, until `settle` returns: whoever changes something calls `shards` or `fill` first,
        and those wait for it.
        """
        self._readers.append(settle)

    def _recall(self) -> None:
        while self._readers:
            self._readers.pop()()

    def shards(self) -> dict[str, Tensor]:
        """Return this rank's parts at the finest level, group name -> [rows, elements].

        Views of the parameters, except where those are stored whole and the optimizer's state is
        cut: copies then, for `publish` to write back.
        """
        self._recall()
        self.settle()
        return {group.name: self._shard(group) for group in self.groups}

    def _shard(self, group: Group) -> Tensor:
        buffer = self.stored[group.name]
        if group.num_parts("opt") == group.num_parts("params"):
            return buffer
        rest = group.axes("opt")[len(group.axes("params")) :]
        index = self.comm.index(rest)
        if group.num_parts("params") > 1:
            return buffer.unflatten(1, (-1, group.part_size("opt")))[:, index]
        part = group.allocate(group.dtype, self.comm.device, level="opt")
        for row in range(group.num_rows):
            for leaf in group.leaves:
                whole = group.unflattened(group.whole(buffer[row], leaf), leaf)
                target = group.packed(part[row], leaf, group.num_parts("opt"))
                target.copy_(whole.select(leaf.dim, index))
        return part

    @torch.no_grad()
    def publish(self, shards: Mapping[str, Tensor]) -> None:
        """Take over parts at the finest level; gathers run on while the caller goes on.

        Every use of a parameter waits for its own gather (`settle` for all).
        """
        self.version += 1
        for group in self.groups:
            self._publish(group, shards[group.name])

    def _publish(self, group: Group, part: Tensor) -> None:
        buffer = self.stored[group.name]
        if group.num_parts("opt") == group.num_parts("params"):
            if part is not buffer:
                buffer.copy_(part)
            return
        rest = group.axes("opt")[len(group.axes("params")) :]
        for row in range(group.num_rows):
            narrow = part[row].to(group.dtype).contiguous()
            wait = self.comm.all_gather_async(narrow, rest)
            self._arriving[group.name, row] = self._arrive(group, row, wait)

    def _arrive(self, group: Group, row: int, wait: Wait) -> Callable[[], None]:
        # Of another version counter: rows before this one may be in use, and saved, already.
        target = self.stored[group.name].data[row]

        @torch.no_grad()
        def arrive() -> None:
            packed = wait()
            if group.num_parts("params") > 1:
                target.copy_(packed)
            else:
                unpack(group, packed, target)

        return arrive

    def settle(self, bucket: Bucket | None = None) -> None:
        """Wait for the gathers of one row, or of all, that the last update started."""
        for key in [bucket] if bucket is not None else list(self._arriving):
            if (arrive := self._arriving.pop(key, None)) is not None:
                arrive()

    @torch.no_grad()
    def gather(self, bucket: Bucket) -> Wait:
        """Start gathering a row that is stored cut; waiting returns whole leaves."""
        group = self.by_name[bucket[0]]
        self.settle(bucket)
        row = self.stored[group.name][bucket[1]]
        wait: Wait | None = self.comm.all_gather_async(row, group.axes("params"))

        @torch.no_grad()
        def whole() -> Tensor:
            nonlocal wait
            assert wait is not None
            packed, wait = wait(), None
            return unpack(group, packed, torch.empty_like(packed))

        return whole

    def whole(self) -> dict[str, Tensor]:
        """Return all parameters as rows of whole leaves: the buffers, or gathered copies."""
        self.settle()
        return {
            group.name: torch.stack(
                [self.gather((group.name, row))() for row in range(group.num_rows)]
            )
            if group.num_parts("params") > 1
            else self.stored[group.name]
            for group in self.groups
        }

    def tree(self, like: Any) -> Any:
        """Return the tree of local parameters (None for leaves of other stages)."""
        return views(self.groups, self.whole(), like)

    @torch.no_grad()
    def fill(self, tree: Any) -> None:
        """Copy in a tree of local parameters, whole leaves of all layers."""
        names, leaves, _ = flatten_with_names(tree)
        table = dict(zip(names, leaves, strict=True))
        index = {g.name: self.comm.index(g.axes("params")) for g in self.groups}
        self._recall()
        self.settle()
        self.version += 1
        for group in self.groups:
            parts = group.num_parts("params")
            for row in range(group.num_rows):
                target, layer = self.stored[group.name][row], group.layer(row)
                for leaf in group.leaves:
                    value = table[leaf.path] if layer is None else table[leaf.path][layer]
                    if parts == 1:
                        group.whole(target, leaf).copy_(value)
                    else:
                        part = value.chunk(parts, leaf.dim)[index[group.name]]
                        packed = group.packed(target, leaf, parts)
                        packed.copy_(group.unflattened(part, leaf, parts))


def unpack(group: Group, packed: Tensor, whole: Tensor) -> Tensor:
    """Copy a packed row into a row of whole leaves, and return that."""
    for leaf in group.leaves:
        target = group.unflattened(group.whole(whole, leaf), leaf)
        target.copy_(group.packed(packed, leaf))
    return whole
