"""Parameters as autograd leaves over flat buffers, whose gradients flow back into flat buffers."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatree.parallel.comm import RankComm
from megatree.parallel.layout import PIPELINE
from megatree.parallel.model import ModelProgram
from megatree.runtime.packing import Group

Bucket = tuple[str, int]


class Leaves:
    """A rank's parameters and gradients; works in place on its buffers.

    A hook per leaf adds its gradient into the buffer and, when the last gradient of a row has
    arrived, starts the row's sum over the ranks, under the rest of the backward.
    """

    def __init__(
        self,
        program: ModelProgram,
        comm: RankComm,
        groups: tuple[Group, ...],
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
    ) -> None:
        self.comm, self.groups, self.params, self.grads = comm, groups, params, grads
        self.by_path: dict[tuple[str, int | None], Tensor] = {}
        self._adds: dict[int, Callable[[Tensor], None]] = {}
        self._left: dict[Bucket, int] = {}
        self._waits: list[Callable[[], None]] = []
        for group in groups:
            for row in range(group.num_rows):
                layer = None if group.layers is None else group.layers[row]
                for leaf in group.leaves:
                    value = group.row(params[group.name], leaf, row).detach().requires_grad_()
                    target = group.row(grads[group.name], leaf, row)
                    self._adds[id(value)] = self._accumulate(group, row, target)
                    value.register_post_accumulate_grad_hook(self._hook)
                    self.by_path[leaf.path, layer] = value
        rank = comm.coords.get(PIPELINE, 0)
        self.entries = [
            entry
            for entry, stage in zip(program.order, program.stages, strict=True)
            if program.stage_rank[stage] == rank
        ]
        self.of: dict[tuple[str, int | None], list[Tensor]] = {
            (name, index): [
                self.by_path[path, index if path.startswith(f"{name}.") else None]
                for path in program.units[name].leaves.values()
            ]
            for name, index, _ in self.entries
        }
        self.uses = self._count_uses(program)

    def _count_uses(self, program: ModelProgram) -> dict[Bucket, int]:
        """Return how many gradients of a row arrive per microbatch: one per leaf and stage."""
        stage_of = dict(zip(program.order, program.stages, strict=True))
        stages: dict[int, set[int]] = {}
        for entry in self.entries:
            for leaf in self.of[entry[0], entry[1]]:
                stages.setdefault(id(leaf), set()).add(stage_of[entry])
        return {
            (group.name, row): sum(
                len(stages[id(self.by_path[leaf.path, layer])])
                for leaf in group.leaves
                for layer in [None if group.layers is None else group.layers[row]]
            )
            for group in self.groups
            for row in range(group.num_rows)
        }

    def _accumulate(self, group: Group, row: int, target: Tensor) -> Callable[[Tensor], None]:
        """Return what to do with a gradient of the leaf whose buffer is `target`."""
        bucket = (group.name, row)

        def accumulate(grad: Tensor) -> None:
            target.add_(grad)
            self._left[bucket] -= 1
            if self._left[bucket] == 0:
                self._sum(group, row)

        return accumulate

    def _hook(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        grad, leaf.grad = leaf.grad, None
        self.add(leaf, grad)

    def add(self, leaf: Tensor, grad: Tensor) -> None:
        """Add a gradient that did not come through the leaf's hook."""
        self._adds[id(leaf)](grad)

    def _sum(self, group: Group, row: int) -> None:
        if group.sync:
            wait = self.comm.psum_async(self.grads[group.name][row], group.sync)
            self._waits.append(wait)

    def begin(self, num_microbatches: int) -> None:
        """Start a step: gradients are zero, and every row waits for all its gradients."""
        for buffer in self.grads.values():
            buffer.zero_()
        self._left = {bucket: count * num_microbatches for bucket, count in self.uses.items()}

    def finish(self) -> None:
        """End a step: sums of rows that some leaf did not reach, then of leaves held by stages."""
        for group in self.groups:
            for row in range(group.num_rows):
                if self._left[group.name, row] > 0:
                    self._sum(group, row)
        for wait in self._waits:
            wait()
        self._waits.clear()
        for group in self.groups:
            if group.holders:
                buffer = self.grads[group.name]
                buffer.copy_(self.comm.psum_members(buffer, PIPELINE, group.holders))


def held_groups(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """Return the sets of pipeline ranks that hold a leaf together, in a fixed order."""
    return sorted({group.holders for group in groups if group.holders})


def buffers(
    groups: tuple[Group, ...], device: torch.device, *, grads: bool = False
) -> dict[str, Tensor]:
    """Allocate parameter buffers, or gradient buffers in float32 or better."""
    return {
        group.name: group.allocate(
            torch.promote_types(group.dtype, torch.float32) if grads else group.dtype, device
        )
        for group in groups
    }
