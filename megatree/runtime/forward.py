"""Run a lowered model on one rank: the fold of the carry over bound programs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from megatree.functional.tree import leaves_of
from megatree.parallel.again import Again, Keep
from megatree.parallel.biases import with_biases
from megatree.parallel.codegen import generate
from megatree.parallel.comm import Axes, OneDevice, RankComm
from megatree.parallel.layout import PIPELINE, Layout
from megatree.parallel.model import ModelProgram
from megatree.parallel.pieces import Pieces
from megatree.parallel.remat import Entry
from megatree.parallel.siblings import Siblings, join_siblings
from megatree.parallel.split import DeferredWeight, split_backward
from megatree.runtime.offload import Offload, Transfers
from megatree.runtime.outputs import metric_axes

TermKey = tuple[str, int, str]
"""(unit, layer number, term)."""


@runtime_checkable
class Leaves(Protocol):
    """(unit, layer index within its kind) -> the unit's `w`, flat, in the program's order."""

    def __getitem__(self, entry: tuple[str, int | None], /) -> Sequence[Tensor]:
        """Return the parameters of an entry."""
        ...


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
    """A product of a forward run: its weights and entry, and the slots that its backward fills."""

    weights: tuple[tuple[str, int | None], ...]
    entry: tuple[str, int | None]
    product: DeferredWeight
    slots: tuple[Tensor, Tensor]


AddProduct = Callable[[Sequence[tuple[str, int | None]], DeferredWeight, Tensor, Tensor], None]
"""(weights, product, x, cotangent) -> None: adds the gradients of a product's weights."""


class _Split(NamedTuple):
    """A unit whose products hand out what their weights' gradients are made of.

    Args:
        run: its program; it takes two slots per product beside all else.
        products: those.
        weights: which of the unit's leaves they multiply: nothing flows back to these.
    """

    run: Callable[..., Any]
    products: tuple[DeferredWeight, ...]
    weights: frozenset[int]


class _Slots(torch.autograd.Function):
    """The slots of a product whose weight gradient is added as soon as both have theirs."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, deferred: Deferred, add_product: AddProduct
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.deferred, ctx.add_product = deferred, add_product
        return tuple(slot.detach() for slot in deferred.slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, g = grads
        if x is not None and g is not None:
            ctx.add_product(ctx.deferred.weights, ctx.deferred.product, x, g)
        return None, None, None


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
    found |= metric_axes(program)
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
        siblings: Mapping[str, Sequence[Siblings]] = MappingProxyType({}),
        added: Collection[str] = frozenset(),
    ) -> None:
        """Bind a model.

        Args:
            program: the model.
            comm: this rank's collectives.
            transform: applied to every bound program (torch.compile, say).
            siblings: unit -> weights that lie side by side and are multiplied as one (see
                `side_by_side`).
            added: leaves whose gradients products add by themselves (see `added_by_products`).
        """
        comm.prepare(needed_axes(program))
        self.program, self.comm, self._transform = program, comm, transform
        self._consts = program.consts.bind(comm)
        self._added = added
        self._token = torch.zeros((), device=comm.device, requires_grad=True)
        self._remat = program.layout.remat
        self._layers_of = {name for name, index, _ in program.order if index is not None}
        self._joined = {
            name: join_siblings(u.program, siblings.get(name, ()))
            for name, u in program.units.items()
        }
        self._graphs = {name: with_biases(joined.graph) for name, joined in self._joined.items()}
        self._units = {name: self._bind(name, graph) for name, graph in self._graphs.items()}
        self._weights = {
            name: generate(u.weights, comm)
            for name, u in program.units.items()
            if u.weights is not None
        }
        self._layers = [
            torch.tensor(number, dtype=torch.int64, device=comm.device)
            for number in range(len(program.order))
        ]
        self._const_names = {
            name: sorted(
                {*program.const_names, *(["layer"] if "consts.layer" in u.program.types else [])}
            )
            for name, u in program.units.items()
        }
        self._deferred: dict[tuple[str, int | None], list[Deferred]] = {}
        self._adding: dict[tuple[str, int | None], list[Deferred]] = {}

    @cached_property
    def _split_units(self) -> dict[str, _Split]:
        """The units with deferred weight gradients."""
        sizes = self.program.layout.sizes
        deferred: dict[str, set[str]] = {}
        for name, unit in self.program.units.items():
            found = split_backward(self._graphs[name], sizes)[1]
            paths = {path for product in found for path in product.paths}
            deferred[name] = {unit.leaves[path.removeprefix("w.")] for path in paths}
        # A leaf that a stage also uses otherwise (a tied table) has its gradient from autograd.
        mixed: set[str] = set()
        for stage in range(len(self.program.stage_rank)):
            units = {name for name, _, _ in self.program.entries(stage)}
            some = {path for name in units for path in deferred[name]}
            mixed |= {
                path
                for name in units
                for path in self.program.units[name].leaves.values()
                if path in some and path not in deferred[name]
            }

        def wanted(name: str, product: DeferredWeight) -> bool:
            leaves = self.program.units[name].leaves
            return all(leaves[path.removeprefix("w.")] not in mixed for path in product.paths)

        return {name: self._split(name, partial(wanted, name)) for name in self._joined}

    @cached_property
    def _adding_units(self) -> dict[str, _Split]:
        """The units with products that add the gradients of their weights by themselves."""
        out = {}
        for name, unit in self.program.units.items():
            added = {f"w.{local}" for local, path in unit.leaves.items() if path in self._added}

            def wanted(product: DeferredWeight, added: set[str] = added) -> bool:
                # What is no product of matrices, or one of several, goes autograd's way: its
                # gradient is right, but rounded to the dtype of the leaf.
                fits = product.alone and product.letters.matrix() is not None
                return fits and added.issuperset(product.paths)

            if added and (split := self._split(name, wanted)).products:
                out[name] = split
        return out

    def _split(self, name: str, wanted: Callable[[DeferredWeight], bool]) -> _Split:
        sizes = self.program.layout.sizes
        graph, products = split_backward(self._graphs[name], sizes, wanted=wanted)
        paths = {path for product in products for path in product.paths}
        leaves = enumerate(self.program.units[name].leaves)
        weights = frozenset(at for at, local in leaves if f"w.{local}" in paths)
        return _Split(self._bind(name, graph), products, weights)

    def _bind(self, name: str, graph: fx.Graph) -> Callable[..., Any]:
        """Bind the graph of a unit; that of a layer in pieces if some of it runs again."""
        if self._remat.policy == "selective" and name in self._layers_of:
            return Pieces(graph, self.comm, self._remat, transform=self._transform)
        return self._transform(generate(graph, self.comm))

    @cached_property
    def _transfers(self) -> Transfers:
        return Transfers(self.comm.device)

    def _slots(self, name: str, index: int | None) -> list[Deferred]:
        """Return the deferred products of an entry with their slots: tensors without memory.

        All microbatches share them: a slot holds nothing, and a backward sees its own graph only.
        """
        if (name, index) not in self._deferred:
            products = self._split_units[name].products
            self._deferred[name, index] = self._make_slots(products, name, index)
        return self._deferred[name, index]

    def _adding_slots(self, name: str, index: int | None) -> list[Deferred]:
        """Return the products of an entry that add by themselves, with their slots."""
        if (name, index) not in self._adding:
            products = self._adding_units[name].products
            self._adding[name, index] = self._make_slots(products, name, index)
        return self._adding[name, index]

    def _make_slots(
        self, products: Sequence[DeferredWeight], name: str, index: int | None
    ) -> list[Deferred]:
        leaves = self.program.units[name].leaves

        def slot(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            zero = torch.zeros((), dtype=dtype, device=self.comm.device)
            return zero.expand(shape).requires_grad_()

        def weight(path: str) -> tuple[str, int | None]:
            return path, index if path.startswith(f"{name}.") else None

        return [
            Deferred(
                tuple(weight(leaves[path.removeprefix("w.")]) for path in product.paths),
                (name, index),
                product,
                (slot(product.x, product.dtype), slot(product.y, product.dtype)),
            )
            for product in products
        ]

    def consts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the consts of a local microbatch.

        What a survey would add (`Chain.survey`) is zero where nobody has made one.

        Raises:
            ValueError: an entry is missing, too much, or not this rank's piece of what the model
                was lowered for: counts and offsets of the program are those of its shapes.
        """
        batch = {**self.no_survey, **batch}
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

    @cached_property
    def no_survey(self) -> dict[str, Tensor]:
        """What a survey would add, as it is without one."""
        types, sizes = self.program.consts.types, self.program.layout.sizes
        return {
            name: torch.zeros(
                types[f"batch.{name}"].local_shape(sizes),
                dtype=types[f"batch.{name}"].dtype,
                device=self.comm.device,
            )
            for name in self.program.model.survey
        }

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
        layer = self._layers[number]
        return [layer if name == "layer" else consts[name] for name in self._const_names[unit]]

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
        keep: Keep | None = None,
        again: Callable[[Sequence[tuple[str, int | None]]], Leaves] | None = None,
        add_product: AddProduct | None = None,
    ) -> Forward:
        """Fold the carry over entries of the program's order; records gradients if leaves ask.

        Args:
            entries: (unit, index within its kind, number) in order.
            leaves: the units' parameters.
            carry: flat local tensors that enter the first entry.
            consts: of this microbatch.
            defer: leave the weight gradients of products for later.
            keep: how tensors wait for the backward; None: as autograd keeps them.
            again: (unit, index) of entries that run again, to their parameters then; None: as
                in `leaves`.
            add_product: takes gradients that products add by themselves; None: none do.
        """
        found = Forward((), {}, {}, [])
        if not torch.is_grad_enabled():
            carry = self._fold(entries, found, leaves, consts, False, None, None, *carry)
            return replace(found, carry=carry)
        stays = [*carry]  # the caller holds it
        before: Offload | None = None
        for group, twice in self._remat.groups(entries):
            waits = keep
            if self._remat.offload and group[0][1] is not None:
                waits = before = Offload(self._transfers, keep or Keep(), before, stays)
            fold = partial(self._fold, group)
            if twice:
                names = [(name, index) for name, index, _ in group]
                call = Again(
                    partial(fold, found, leaves, consts, defer, add_product, None),
                    keep=waits or Keep(),
                    keep_made=keep or Keep(),
                    second=partial(
                        fold,
                        Forward((), {}, {}, []),
                        leaves if again is None else again(names),
                        consts,
                        defer,
                        add_product,
                        None,
                    ),
                )
                carry = call(*carry)
            else:
                carry = fold(found, leaves, consts, defer, add_product, waits, *carry)
        return replace(found, carry=carry)

    def _fold(
        self,
        entries: Sequence[Entry],
        found: Forward,
        leaves: Leaves,
        consts: Mapping[str, Tensor],
        defer: bool,
        add_product: AddProduct | None,
        keep: Keep | None,
        *carry: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the carry after some entries; their outputs go into `found`."""
        for name, index, number in entries:
            unit = self.program.units[name]
            w, rest = leaves[name, index], self._consts_for(name, consts, number)
            split: _Split | None = None
            slots: list[Tensor] = []
            if defer:
                split, mine = self._split_units[name], self._slots(name, index)
                found.deferred.extend(mine)
                slots = [slot for product in mine for slot in product.slots]
            elif add_product is not None and name in self._adding_units:
                split = self._adding_units[name]
                for product in self._adding_slots(name, index):
                    slots += _Slots.apply(self._token, product, add_product)
            run = self._units[name]
            if split is not None:
                run = split.run
                w = [x.detach() if at in split.weights else x for at, x in enumerate(w)]
            w = self._joined[name](w)
            if isinstance(keep, Offload):
                keep.leave(*w, *rest)
            inputs = (*w, *carry, *rest, *slots)
            if isinstance(run, Pieces):
                out = run(*inputs, keep=keep)
            else:
                with nullcontext() if keep is None else keep.hooks():
                    out = run(*inputs)
            for term, (at, _) in unit.terms.items():
                found.sums[name, number, term] = out[at]
            for metric, at in unit.metrics.items():
                found.metrics[name, number, metric] = out[at].detach()
            carry = out[: unit.num_carry]
            del w, inputs  # weights gathered for this entry go before the next are whole
        return carry
