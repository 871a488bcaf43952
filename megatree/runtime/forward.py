"""Run a lowered model on one rank: the fold of the carry over bound programs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatree.functional.tree import leaves_of
from megatree.parallel.codegen import generate
from megatree.parallel.comm import Axes, OneDevice, RankComm
from megatree.parallel.layout import PIPELINE, Layout
from megatree.parallel.model import ModelProgram
from megatree.parallel.split import DeferredWeight, split_backward
from megatree.parallel.types import ShardType

TermKey = tuple[str, int, str]
"""(unit, layer number, term)."""

Leaves = Mapping[tuple[str, int | None], Sequence[Tensor]]
"""(unit, layer index within its kind) -> the unit's `w`, flat, in the program's order."""


@dataclass(frozen=True)
class Forward:
    """What a forward run returns.

    Args:
        carry: the last carry, flat local tensors.
        sums: (unit, number, term) -> local sum.
        metrics: (unit, number, name) -> local value.
        deferred: products whose weight gradients are left for later (see `parallel.split`).
    """

    carry: tuple[Tensor, ...]
    sums: dict[TermKey, Tensor]
    metrics: dict[TermKey, Tensor]
    deferred: list["Deferred"]


@dataclass(frozen=True)
class Deferred:
    """A product of a forward run: its weight (a leaf), and the slots that its backward fills."""

    weight: Tensor
    product: DeferredWeight
    slots: tuple[Tensor, Tensor]


def needed_axes(program: ModelProgram) -> list[Axes]:
    """Return every tuple of mesh axes over which the model communicates, in a fixed order."""
    found: set[Axes] = {tuple(program.layout.mesh.sizes)}
    for part in program.programs():
        found |= {c.axes for c in part.collectives}
        found |= part.table_axes
        found |= {ty.axes_in("P") for ty in part.out_types}
    if PIPELINE in program.layout.mesh.sizes:
        found |= {
            (PIPELINE, *ty.axes_in("P"))
            for u in program.units.values()
            for ty in u.program.out_types
        }
    return sorted(axes for axes in found if axes)


def one_device(layout: Layout) -> OneDevice:
    """Return the comm of a layout of one rank.

    Raises:
        ValueError: the layout has more ranks.
    """
    if layout.mesh.num_ranks != 1:
        raise ValueError(
            f"comm: the layout has {layout.mesh.num_ranks} ranks ({layout.mesh}) and no comm is "
            "given. Pass comm=ProcessComm(layout.mesh) in each of as many processes (see launch)."
        )
    return OneDevice()


class BoundModel:
    """A lowered model bound to one rank's comm."""

    def __init__(
        self,
        program: ModelProgram,
        comm: RankComm,
        *,
        transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
    ) -> None:
        comm.prepare(needed_axes(program))
        self.program, self.comm, self._transform = program, comm, transform
        self._consts = program.consts.bind(comm)
        self._units = {name: transform(u.program.bind(comm)) for name, u in program.units.items()}
        self._weights = {
            name: generate(u.weights, comm)
            for name, u in program.units.items()
            if u.weights is not None
        }
        self._layers = [
            torch.tensor(number, dtype=torch.int64, device=comm.device)
            for number in range(len(program.order))
        ]

    @cached_property
    def _split_units(self) -> dict[str, tuple[Callable[..., Any], tuple[DeferredWeight, ...]]]:
        """The units with deferred weight gradients."""
        out = {}
        for name, unit in self.program.units.items():
            graph, deferred = split_backward(unit.program)
            out[name] = (self._transform(generate(graph, self.comm)), deferred)
        return out

    def _slots(self, name: str, w: Sequence[Tensor]) -> list[Deferred]:
        """Make the slots of a unit's deferred products: tensors of a shape, without memory."""
        sizes, leaves = self.program.layout.sizes, list(self.program.units[name].leaves)

        def slot(ty: ShardType) -> Tensor:
            zero = torch.zeros((), dtype=ty.dtype, device=self.comm.device)
            return zero.expand(ty.local_shape(sizes)).requires_grad_()

        return [
            Deferred(
                w[leaves.index(product.path.removeprefix("w."))],
                product,
                (slot(product.x), slot(product.y)),
            )
            for product in self._split_units[name][1]
        ]

    def consts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the consts of a local microbatch.

        Raises:
            ValueError: an entry is missing, too much, or not this rank's piece of what the model
                was lowered for: counts and offsets of the program are those of its shapes.
        """
        missing = sorted(set(self.program.model.batch) ^ set(batch))
        if missing:
            raise ValueError(
                f"batch: has {sorted(batch)}, the model takes {sorted(self.program.model.batch)}. "
                f"Add or drop {missing}."
            )
        for name, x in batch.items():
            ty = self.program.consts.types[f"batch.{name}"]
            expected = ty.local_shape(self.program.layout.sizes)
            if tuple(x.shape) != expected or x.dtype != ty.dtype:
                raise ValueError(
                    f"batch.{name}: is {x.dtype} {list(x.shape)}, this rank's piece of {ty} is "
                    f"{ty.dtype} {list(expected)}. Cut the microbatch by the layout, or lower the "
                    "model for other sizes (Chain.with_sizes)."
                )
        with torch.no_grad():
            flat = self._consts(*leaves_of(dict(batch)))
        return dict(zip(self.program.const_names, flat, strict=True))

    def weights(self, consts: Mapping[str, Tensor]) -> dict[TermKey, Tensor]:
        """Compute the local weights of all loss terms; they depend on the batch alone."""
        out: dict[TermKey, Tensor] = {}
        with torch.no_grad():
            for unit_name, _, number in self.program.order:
                if unit_name not in self._weights:
                    continue
                unit = self.program.units[unit_name]
                flat = self._consts_for(unit_name, consts, number)
                blanks = [None] * (len(unit.program.types) - len(flat))
                for term, weight in zip(
                    unit.terms, self._weights[unit_name](*blanks, *flat), strict=True
                ):
                    out[unit_name, number, term] = weight
        return out

    def _consts_for(self, unit: str, consts: Mapping[str, Tensor], number: int) -> list[Tensor]:
        table = dict(consts)
        if "consts.layer" in self.program.units[unit].program.types:
            table["layer"] = self._layers[number]
        return [table[name] for name in sorted(table)]

    @property
    def term_keys(self) -> list[TermKey]:
        """The terms of all units and layers, in execution order."""
        return [
            (name, number, term)
            for name, _, number in self.program.order
            for term in self.program.units[name].terms
        ]

    def run(
        self,
        entries: Sequence[tuple[str, int | None, int]],
        leaves: Leaves,
        carry: tuple[Tensor, ...],
        consts: Mapping[str, Tensor],
        *,
        defer: bool = False,
    ) -> Forward:
        """Fold the carry over entries of the program's order; records gradients if leaves ask.

        Args:
            entries: (unit, index within its kind, number) in order.
            leaves: the units' parameters.
            carry: flat local tensors that enter the first entry.
            consts: of this microbatch.
            defer: leave the weight gradients of products for later.
        """
        deferred: list[Deferred] = []
        sums: dict[TermKey, Tensor] = {}
        metrics: dict[TermKey, Tensor] = {}
        for name, index, number in entries:
            unit = self.program.units[name]
            inputs = (*leaves[name, index], *carry, *self._consts_for(name, consts, number))
            if defer:
                mine = self._slots(name, leaves[name, index])
                deferred += mine
                slots = (slot for product in mine for slot in product.slots)
                out = self._split_units[name][0](*inputs, *slots)
            else:
                out = self._units[name](*inputs)
            for term, (at, _) in unit.terms.items():
                sums[name, number, term] = out[at]
            for metric, at in unit.metrics.items():
                metrics[name, number, metric] = out[at].detach()
            carry = out[: unit.num_carry]
        return Forward(carry, sums, metrics, deferred)
