"""Loss and gradients of a step: weights first, then all microbatches, then the sums."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import PIPELINE, Layout
from megatree.parallel.model import ModelProgram, lower_model
from megatree.runtime.executor import Executor
from megatree.runtime.forward import BoundModel, TermKey, one_device
from megatree.runtime.leaves import Leaves, buffers, held_groups
from megatree.runtime.packing import Group, pack, store, views


@dataclass(frozen=True)
class Gradients:
    """A lowered model with its buffers on one rank; calling it fills `grads` in place.

    Args:
        bound: the model bound to this rank.
        groups: the plan of the buffers.
        params, grads: group name -> buffer [rows, elements].
        executor: runs the schedule.
    """

    bound: BoundModel
    groups: tuple[Group, ...]
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    executor: Executor

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
        leaves = self.executor.leaves
        schedule = self.bound.program.layout.schedule_for(len(microbatches))
        consts, weights = self._consts_and_weights(microbatches, self.bound)
        leaves.begin(len(microbatches))
        sums = self.executor.run(schedule, consts, weights)
        leaves.finish()
        return self._values(sums, weights), {key[2]: weight for key, weight in weights.items()}

    @torch.no_grad()
    def values(
        self, microbatches: Sequence[Mapping[str, Tensor]], bound: BoundModel | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms of the loss without gradients, of this model or its evaluation form."""
        bound = bound or self.bound
        consts, weights = self._consts_and_weights(microbatches, bound)
        executor = Executor(bound, self.executor.leaves)
        return self._values([executor.evaluate(c) for c in consts], weights)

    def _consts_and_weights(
        self, microbatches: Sequence[Mapping[str, Tensor]], bound: BoundModel
    ) -> tuple[list[dict[str, Tensor]], dict[TermKey, Tensor]]:
        """Compute the consts of every microbatch and the terms' weights over the whole step."""
        consts = [bound.consts(batch) for batch in microbatches]
        keys = bound.term_keys
        if not keys:
            raise ValueError(
                f"step: no segment of {sorted(bound.program.units)} has a loss term. "
                'Return {"terms": {name: (sum, weight)}} from one of them.'
            )
        weights = self._total([bound.weights(c) for c in consts], keys, 1)
        empty = sorted({key[2] for key, weight in weights.items() if not weight.item() > 0})
        if empty:
            raise ValueError(
                f"step: loss terms {empty} have no weight in any of {len(microbatches)} "
                "microbatches (every token is masked). Give the step a batch with at least one "
                "token that counts."
            )
        return consts, weights

    def _values(
        self, sums: Sequence[Mapping[TermKey, Tensor]], weights: Mapping[TermKey, Tensor]
    ) -> dict[str, Tensor]:
        """Divide the terms' sums by their weights, and add a stack's layers."""
        values: dict[str, Tensor] = {}
        for key, total in self._total(sums, self.bound.term_keys, 0).items():
            value = total / weights[key]
            values[key[2]] = values[key[2]] + value if key[2] in values else value
        return values

    def _total(
        self, parts: Sequence[Mapping[TermKey, Tensor]], keys: Sequence[TermKey], which: int
    ) -> dict[TermKey, Tensor]:
        """Add a quantity of every term over microbatches and over the axes on which it is pending.

        A sum (`which` 0) exists on the pipeline rank of its stage only; a weight (1) everywhere.
        """
        comm, units = self.bound.comm, self.bound.program.units
        by_axes: dict[tuple[str, ...], list[TermKey]] = {}
        for key in keys:
            unit = units[key[0]]
            axes = unit.program.out_types[unit.terms[key[2]][which]].axes_in("P")
            if which == 0 and PIPELINE in comm.sizes:
                axes = (PIPELINE, *axes)
            by_axes.setdefault(axes, []).append(key)
        out: dict[TermKey, Tensor] = {}
        zero = torch.zeros((), dtype=torch.float64, device=comm.device)
        for axes, group in by_axes.items():
            local = torch.stack(
                [sum((p[key].double() for p in parts if key in p), zero) for key in group]
            )
            total = comm.psum(local, axes) if axes else local
            out.update(zip(group, total.unbind(), strict=True))
        return out


def make_gradients(
    program: ModelProgram,
    comm: RankComm,
    *,
    groups: tuple[Group, ...] | None = None,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
) -> Gradients:
    """Allocate buffers for a lowered model and bind it to a rank; gradients in float32 or
    better.
    """
    rank = comm.coords.get(PIPELINE, 0)
    groups = groups or pack(program, stage_rank=rank)
    bound = BoundModel(program, comm, transform=transform)
    for other in range(program.layout.num_stage_ranks):  # every rank makes every group
        for holders in held_groups(pack(program, stage_rank=other)):
            comm.prepare_members(PIPELINE, holders)
    params = buffers(groups, comm.device)
    grads = buffers(groups, comm.device, grads=True)
    leaves = Leaves(program, comm, groups, params, grads)
    return Gradients(bound, groups, params, grads, Executor(bound, leaves))


def value_and_grad(
    model: Chain, layout: Layout, *, comm: RankComm | None = None
) -> Callable[[Any, Sequence[Mapping[str, Tensor]]], tuple[dict[str, Tensor], Any]]:
    """Return a function of (local parameters, local microbatches) to loss terms and local
    gradients.

    Law: the loss and every gradient equal those of one device, for any layout.

    Args:
        model: a chain.
        layout: mesh and rules, and with a pipeline its placement and schedule.
        comm: this rank's collectives; None for a layout of one rank.

    Returns:
        A function of a tree of local parameters (as `init(..., layout=, coords=)` gives) and a
        sequence of local microbatches; it returns term name -> value, and the tree of gradients
        in float32 or better (of the layers that this rank holds; None for leaves it does not).

    Raises:
        ShardingError: the model cannot be typed under this layout.
    """
    gradients = make_gradients(lower_model(model, layout), comm or one_device(layout))

    def run(
        params: Any, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Any]:
        store(gradients.groups, gradients.params, params)
        values, _ = gradients(microbatches)
        grads = views(gradients.groups, gradients.grads, model.params)
        return values, optree.tree_map(torch.clone, grads)  # the next call writes the buffers again

    return run
