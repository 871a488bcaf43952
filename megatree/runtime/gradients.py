"""Loss and gradients of a step: weights first, then all microbatches, then the sums."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import PIPELINE, Layout
from megatree.parallel.model import ModelProgram, lower_model
from megatree.parallel.packing import Group, pack, views
from megatree.parallel.precision import Precision
from megatree.parallel.siblings import side_by_side
from megatree.runtime.executor import Executor
from megatree.runtime.forward import BoundModel, TermKey, one_device
from megatree.runtime.leaves import Leaves, added_by_products, count_uses, held_groups
from megatree.runtime.outputs import whole_metrics
from megatree.runtime.stages import run_stages
from megatree.runtime.sums import GradientSums
from megatree.runtime.weights import Weights, unpack


@dataclass(frozen=True)
class Gradients:
    """A lowered model with its buffers on one rank; calling it fills `sums` in place.

    Args:
        bound: the model bound to this rank.
        groups: the plan of the buffers.
        weights: the parameters.
        sums: their gradients.
        executor: runs the schedule.
        precision: what is stored in which dtype.
    """

    bound: BoundModel
    groups: tuple[Group, ...]
    weights: Weights
    sums: GradientSums
    executor: Executor
    precision: Precision

    def __call__(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        *,
        scale: float | Tensor = 1.0,
        look: bool = True,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Compute the terms of the loss and, into `sums`, the gradient of their sum.

        Args:
            microbatches: local batches; every term is divided by its weight over all of them and
                all ranks.
            scale: multiplies the gradients (see `LossScale`).
            look: whether to wait for the weights and look at them; else the caller does so later
                (`check_weights`), and without a weight all gradients are nan.

        Returns:
            The value of each term, and its weight, as scalars that all ranks share; and the
            metrics of all segments (see `whole_metrics`).

        Raises:
            ValueError: a term has no weight in the whole step (every token is masked).
        """
        leaves = self.executor.leaves
        self.precision.check_microbatches(len(microbatches))
        microbatches = self.surveyed(microbatches)
        schedule = self.bound.program.layout.schedule_for(len(microbatches))
        consts, weights = self._consts_and_weights(microbatches, self.bound, look=look)
        leaves.begin(len(microbatches))
        outputs = self.executor.run(schedule, consts, weights, scale=scale)
        leaves.finish()
        return (
            self._values([out.sums for out in outputs], weights, self.bound),
            {key[2]: weight for key, weight in weights.items()},
            whole_metrics(self.bound.program, self.bound.comm, [out.metrics for out in outputs]),
        )

    @torch.no_grad()
    def surveyed(
        self, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> Sequence[Mapping[str, Tensor]]:
        """Add what the model wants to know of the whole step before it takes gradients
        (`Chain.survey`): a forward of all microbatches, if there are several.
        """
        bound, survey = self.bound, self.bound.program.model.survey
        if not survey or len(microbatches) == 1:
            return microbatches
        parts = [
            run_stages(bound, self.executor.leaves.of, bound.consts(batch)).metrics
            for batch in microbatches
        ]
        outs = whole_metrics(bound.program, bound.comm, parts)
        found = {}
        for entry, sources in survey.items():
            found[entry] = table = torch.zeros_like(bound.no_survey[entry])
            for metric, first in sources.items():
                unit = metric.rpartition(".")[0]
                rows = [first + number for name, _, number in bound.program.order if name == unit]
                table[rows] = outs[metric].mean(0).to(table.dtype)
        return [{**batch, **found} for batch in microbatches]

    @torch.no_grad()
    def values(
        self, microbatches: Sequence[Mapping[str, Tensor]], bound: BoundModel | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the terms of the loss and the metrics without gradients, of this model or its
        evaluation form.
        """
        bound = bound or self.bound
        consts, weights = self._consts_and_weights(microbatches, bound)
        outputs = [run_stages(bound, self.executor.leaves.of, c) for c in consts]
        return (
            self._values([out.sums for out in outputs], weights, bound),
            whole_metrics(bound.program, bound.comm, [out.metrics for out in outputs]),
        )

    def _consts_and_weights(
        self, microbatches: Sequence[Mapping[str, Tensor]], bound: BoundModel, *, look: bool = True
    ) -> tuple[list[dict[str, Tensor]], dict[TermKey, Tensor]]:
        """Compute the consts of every microbatch and the terms' weights over the whole step."""
        consts = [bound.consts(batch) for batch in microbatches]
        keys = bound.term_keys
        if not keys:
            raise ValueError(
                f"step: no segment of {sorted(bound.program.units)} has a loss term. "
                'Return {"terms": {name: (sum, weight)}} from one of them.'
            )
        weights = self._total([bound.weights(c) for c in consts], keys, 1, bound)
        if look:
            read = [(key[2], weight.item()) for key, weight in weights.items()]
            check_weights(read, len(microbatches))
        return consts, weights

    def _values(
        self,
        sums: Sequence[Mapping[TermKey, Tensor]],
        weights: Mapping[TermKey, Tensor],
        bound: BoundModel,
    ) -> dict[str, Tensor]:
        """Divide the terms' sums by their weights, and add a stack's layers."""
        values: dict[str, Tensor] = {}
        for key, total in self._total(sums, bound.term_keys, 0, bound).items():
            value = total / weights[key]
            values[key[2]] = values[key[2]] + value if key[2] in values else value
        return values

    def _total(
        self,
        parts: Sequence[Mapping[TermKey, Tensor]],
        keys: Sequence[TermKey],
        which: int,
        bound: BoundModel,
    ) -> dict[TermKey, Tensor]:
        """Add a quantity of every term over microbatches and over the axes on which it is pending.

        A sum (`which` 0) exists on the pipeline rank of its stage only; a weight (1) everywhere.
        """
        comm, units = bound.comm, bound.program.units
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


def check_weights(weights: Iterable[tuple[str, float]], num_microbatches: int) -> None:
    """Refuse a step in which a loss term has no weight.

    Args:
        weights: (term, its weight over the whole step).
        num_microbatches: of the step.

    Raises:
        ValueError: names the terms.
    """
    if empty := sorted({name for name, weight in weights if not weight > 0}):
        raise ValueError(
            f"step: loss terms {empty} have no weight in any of {num_microbatches} "
            "microbatches (every token is masked). Give the step a batch with at least one "
            "token that counts."
        )


def make_gradients(
    program: ModelProgram,
    comm: RankComm,
    *,
    groups: tuple[Group, ...] | None = None,
    precision: Precision = Precision(),  # noqa: B008 (frozen)
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
) -> Gradients:
    """Allocate buffers for a lowered model and bind it to a rank."""
    rank = comm.coords.get(PIPELINE, 0)
    groups = groups or pack(program, stage_rank=rank)
    siblings = side_by_side(program, groups)
    added = added_by_products(program, groups, precision)
    bound = BoundModel(program, comm, transform=transform, siblings=siblings, added=added)
    everywhere = [
        group
        for other in range(program.layout.num_stage_ranks)  # every rank makes every set of ranks
        for group in pack(program, stage_rank=other)
    ]
    comm.prepare(storage_axes(everywhere))
    for holders in held_groups(everywhere):
        comm.prepare_members(PIPELINE, holders)
    weights = Weights(comm, groups)
    sums = GradientSums(comm, groups, count_uses(program, comm, groups), precision)
    leaves = Leaves(program, comm, weights, sums)
    return Gradients(bound, groups, weights, sums, Executor(bound, leaves), precision)


def storage_axes(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return every tuple of mesh axes over which storage communicates, in a fixed order."""
    found: set[tuple[str, ...]] = set()
    for group in groups:
        params, grads, opt = (group.axes(level) for level in ("params", "grads", "opt"))
        for axes in (params, grads, opt, opt[len(params) :], opt[len(grads) :]):
            found |= {axes, tuple(axis for axis in axes if axis in group.sync)}
        found.add(tuple(axis for axis in group.sync if axis not in opt))
    return sorted(axes for axes in found if axes)


def value_and_grad(
    model: Chain,
    layout: Layout,
    *,
    comm: RankComm | None = None,
    precision: Precision = Precision(),  # noqa: B008 (frozen)
) -> Callable[[Any, Sequence[Mapping[str, Tensor]]], tuple[dict[str, Tensor], Any]]:
    """Return a function of (local parameters, local microbatches) to loss terms and local
    gradients.

    Law: the loss and every gradient equal those of one device, for any layout and storage.

    Args:
        model: a chain.
        layout: mesh, rules and storage, and with a pipeline its placement and schedule.
        comm: this rank's collectives; None for a layout of one rank.
        precision: what is stored in which dtype.

    Returns:
        A function of a tree of local parameters (as `init(..., layout=, coords=)` gives) and a
        sequence of local microbatches; it returns term name -> value, and the tree of gradients
        in float32 or better (of the layers that this rank holds; None for leaves it does not).

    Raises:
        ShardingError: the model cannot be typed under this layout.
    """
    gradients = make_gradients(
        lower_model(model, layout), comm or one_device(layout), precision=precision
    )

    def run(
        params: Any, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Any]:
        gradients.weights.fill(params)
        values, _, _ = gradients(microbatches)
        grads = views(gradients.groups, whole_gradients(gradients), model.params)
        return values, optree.tree_map(torch.clone, grads)  # the next call writes the buffers again

    return run


def whole_gradients(gradients: Gradients) -> dict[str, Tensor]:
    """Return the gradients of all parameters of this rank as rows of whole leaves."""
    comm, shards = gradients.bound.comm, gradients.sums.shards()
    out = {}
    for group in gradients.groups:
        part = shards[group.name]
        if group.num_parts("opt") > 1:
            rows = [comm.all_gather(row.contiguous(), group.axes("opt"), 0) for row in part]
            part = torch.stack([unpack(group, row, torch.empty_like(row)) for row in rows])
        out[group.name] = part
    return out
