"""Loss and gradients of a step: microbatches, accumulation in float32, overlapped sync."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import Layout
from megatree.parallel.model import ModelProgram, lower_model
from megatree.runtime.forward import BoundModel, one_device
from megatree.runtime.packing import Group, pack, store, views

TermKey = tuple[str, int, str]


@dataclass
class Gradients:
    """Parameters as leaves over flat buffers, and the gradients that flow back into flat buffers.

    Works in place: `params` and `grads` are buffers (group name -> [rows, elements]).
    """

    bound: BoundModel
    groups: tuple[Group, ...]
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    leaves: dict[tuple[str, int | None], list[Tensor]] = field(default_factory=dict)
    _left: dict[tuple[str, int], int] = field(default_factory=dict)
    _waits: list[Callable[[], None]] = field(default_factory=list)
    _started: set[tuple[str, int]] = field(default_factory=set)
    _last: bool = False

    def __post_init__(self) -> None:
        by_path: dict[str, list[Tensor]] = {}
        for group in self.groups:
            for leaf in group.leaves:
                rows = []
                for row in range(group.rows):
                    part = slice(leaf.start, leaf.start + leaf.size)
                    value = self.params[group.name][row, part].view(leaf.shape)
                    value = value.detach().requires_grad_()
                    target = self.grads[group.name][row, part].view(leaf.shape)
                    value.register_post_accumulate_grad_hook(self._hook(group, row, target))
                    rows.append(value)
                by_path[leaf.path] = rows
        for name, index, _ in self.bound.program.order:
            unit = self.bound.program.units[name]
            self.leaves[name, index] = [
                by_path[path][index or 0] for path in unit.leaves.values()
            ]

    def _hook(self, group: Group, row: int, target: Tensor) -> Callable[[Tensor], None]:
        bucket = (group.name, row)

        def accumulate(leaf: Tensor) -> None:
            target.add_(leaf.grad)
            leaf.grad = None
            if self._last:
                self._left[bucket] -= 1
                if self._left[bucket] == 0:
                    self._start(group, row)

        return accumulate

    def _start(self, group: Group, row: int) -> None:
        self._started.add((group.name, row))
        if group.sync:
            comm = self.bound.comm
            self._waits.append(comm.psum_async(self.grads[group.name][row], group.sync))

    def __call__(
        self, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the terms of the loss and, into `grads`, the gradient of their sum.

        Args:
            microbatches: local batches; every term is divided by its weight over all of them and
                all ranks.

        Returns:
            The value of each term, and its weight, as scalars that all ranks share.

        Raises:
            ValueError: a term has no weight in the whole step (every token is masked).
        """
        for buffer in self.grads.values():
            buffer.zero_()
        all_consts, weights = self._consts_and_weights(microbatches, self.bound)
        sums: list[dict[TermKey, Tensor]] = []
        self._left = {
            (group.name, row): len(group.leaves)
            for group in self.groups
            for row in range(group.rows)
        }
        self._started.clear()
        for number, consts in enumerate(all_consts):
            self._last = number == len(all_consts) - 1
            forward = self.bound.run(self.leaves, consts)
            roots = list(forward.sums)
            torch.autograd.backward(
                [forward.sums[key] for key in roots],
                [(1.0 / weights[key]).to(forward.sums[key].dtype) for key in roots],
            )
            sums.append({key: value.detach() for key, value in forward.sums.items()})
        for group in self.groups:  # buckets with a leaf that nothing used
            for row in range(group.rows):
                if (group.name, row) not in self._started:
                    self._start(group, row)
        for wait in self._waits:
            wait()
        self._waits.clear()
        return self._values(sums, weights), {key[2]: weight for key, weight in weights.items()}

    @torch.no_grad()
    def values(
        self, microbatches: Sequence[Mapping[str, Tensor]], bound: BoundModel | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms of the loss without gradients, of this model or its evaluation form."""
        bound = bound or self.bound
        all_consts, weights = self._consts_and_weights(microbatches, bound)
        return self._values([bound.run(self.leaves, c).sums for c in all_consts], weights)

    def _consts_and_weights(
        self, microbatches: Sequence[Mapping[str, Tensor]], bound: BoundModel
    ) -> tuple[list[dict[str, Tensor]], dict[TermKey, Tensor]]:
        """Compute the consts of every microbatch and the terms' weights over the whole step."""
        all_consts = [bound.consts(batch) for batch in microbatches]
        weights = self._total([bound.weights(consts) for consts in all_consts], 1)
        empty = sorted({key[2] for key, weight in weights.items() if not weight.item() > 0})
        if empty:
            raise ValueError(
                f"step: loss terms {empty} have no weight in any of {len(microbatches)} "
                "microbatches (every token is masked). Give the step a batch with at least one "
                "token that counts."
            )
        return all_consts, weights

    def _values(
        self, sums: Sequence[Mapping[TermKey, Tensor]], weights: Mapping[TermKey, Tensor]
    ) -> dict[str, Tensor]:
        """Divide the terms' sums by their weights, and add a stack's layers."""
        values: dict[str, Tensor] = {}
        for key, total in self._total(sums, 0).items():
            value = total / weights[key]
            values[key[2]] = values[key[2]] + value if key[2] in values else value
        return values

    def _total(
        self, parts: Sequence[Mapping[TermKey, Tensor]], which: int
    ) -> dict[TermKey, Tensor]:
        """Add a quantity of every term over microbatches and over the axes on which it is pending."""
        units = self.bound.program.units
        by_axes: dict[tuple[str, ...], list[TermKey]] = {}
        for key in parts[0]:
            unit = units[key[0]]
            ty = unit.program.out_types[unit.terms[key[2]][which]]
            by_axes.setdefault(ty.axes_in("P"), []).append(key)
        out: dict[TermKey, Tensor] = {}
        for axes, keys in by_axes.items():
            local = torch.stack(
                [sum(part[key].double() for part in parts) for key in keys]  # type: ignore[misc]
            )
            total = self.bound.comm.psum(local, axes) if axes else local
            out.update(zip(keys, total.unbind(), strict=True))
        return out


def make_gradients(
    program: ModelProgram,
    comm: RankComm,
    *,
    groups: tuple[Group, ...] | None = None,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
) -> Gradients:
    """Allocate buffers for a lowered model and bind it to a rank; gradients in float32 or better."""
    groups = groups or pack(program)
    return Gradients(
        bound=BoundModel(program, comm, transform=transform),
        groups=groups,
        params={g.name: g.allocate(g.dtype, comm.device) for g in groups},
        grads={
            g.name: g.allocate(torch.promote_types(g.dtype, torch.float32), comm.device)
            for g in groups
        },
    )


def value_and_grad(
    model: Chain, layout: Layout, *, comm: RankComm | None = None
) -> Callable[[Any, Sequence[Mapping[str, Tensor]]], tuple[dict[str, Tensor], Any]]:
    """Return a function of (local parameters, local microbatches) to loss terms and local gradients.

    Law: the loss and every gradient equal those of one device, for any layout.

    Args:
        model: a chain.
        layout: mesh and rules.
        comm: this rank's collectives; None for a layout of one rank.

    Returns:
        A function of a tree of local parameters (as `init(..., layout=, coords=)` gives) and a
        sequence of local microbatches; it returns term name -> value, and the tree of gradients
        in float32 or better.

    Raises:
        ShardingError: the model cannot be typed under this layout.
    """
    gradients = make_gradients(lower_model(model, layout), comm or one_device(layout))

    def run(
        params: Any, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Any]:
        store(gradients.groups, gradients.params, params)
        values, _ = gradients(microbatches)
        return values, views(gradients.groups, gradients.grads, model.params)

    return run
