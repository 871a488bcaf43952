"""Parameters as autograd sees them: leaves over flat buffers, or rows gathered for each use."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatree.parallel.again import Keep
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import PIPELINE
from megatree.parallel.model import ModelProgram
from megatree.parallel.packing import Group, Leaf
from megatree.parallel.precision import Precision
from megatree.parallel.split import DeferredWeight, weight_gradient
from megatree.runtime.sums import GradientSums
from megatree.runtime.weights import Bucket, Wait, Weights

Key = tuple[str, int | None]
"""(path, layer of the leaf's unit or None)."""

Entry = tuple[str, int | None]
"""(unit, layer index within its kind or None)."""


class _Place(NamedTuple):
    """Where a leaf is: its group, its row, itself."""

    group: Group
    row: int
    leaf: Leaf

    @property
    def bucket(self) -> Bucket:
        return self.group.name, self.row


class Leaves:
    """A rank's parameters for a forward, whose gradients flow into its sums.

    A row that lies whole in memory is an autograd leaf per parameter, with a hook that adds its
    gradient. A row that is stored cut is gathered when an entry of the program needs it, one entry
    ahead, and given up when the next begins; what autograd saves of it is replaced by a note, and
    gathered again in the backward. So at most two entries' rows are whole at any time.
    """

    def __init__(
        self, program: ModelProgram, comm: RankComm, weights: Weights, sums: GradientSums
    ) -> None:
        self.program, self.weights, self.sums = program, weights, sums
        self.entries = entries_of(program, comm)
        self._places = {
            (leaf.path, group.layer(row)): _Place(group, row, leaf)
            for group in weights.groups
            for row in range(group.num_rows)
            for leaf in group.leaves
        }
        self._keys = {entry: keys_of(program, entry) for entry in self.entries}
        self._resident: dict[Key, Tensor] = {}
        self._key_of: dict[int, Key] = {}
        for key, (group, row, leaf) in self._places.items():
            if group.num_parts("params") == 1:
                value = group.whole(weights.stored[group.name][row], leaf)
                value = value.detach()
                if group.trained:
                    value.requires_grad_().register_post_accumulate_grad_hook(self._hook)
                self._resident[key], self._key_of[id(value)] = value, key
        self._gathered = Gathered(weights)
        self._rows = {
            entry: list(
                dict.fromkeys(self._places[key].bucket for key in keys if key not in self._resident)
            )
            for entry, keys in self._keys.items()
        }
        self._whole_rows = {
            entry: list(
                dict.fromkeys(self._places[key].bucket for key in keys if key in self._resident)
            )
            for entry, keys in self._keys.items()
        }
        self._tokens = {
            bucket: torch.zeros((), device=comm.device, requires_grad=True)
            for rows in self._rows.values()
            for bucket in rows
        }
        self._after = dict(zip(self.entries, self.entries[1:], strict=False))
        self._before = dict(zip(self.entries[1:], self.entries, strict=False))
        self.cuts = bool(self._tokens)

    @property
    def of(self) -> "Leaves":
        """Entry -> its parameters, flat, in the program's order."""
        return self

    def __getitem__(self, entry: Entry) -> Sequence[Tensor]:
        return self.load(entry, self._after.get(entry))

    def again(self, entries: Sequence[Entry]) -> "_Again":
        """Return the parameters of entries that run a second time, before their backward."""
        following: dict[Entry, Entry | None] = dict(pairwise(entries))
        following[entries[-1]] = self._before.get(entries[-1])
        return _Again(self, following)

    def load(self, entry: Entry, following: Entry | None) -> Sequence[Tensor]:
        """Return an entry's parameters, and start to gather those of the one that follows."""
        for bucket in self._whole_rows[entry]:
            self.weights.settle(bucket)
        if not self._rows[entry]:
            return [self._resident[key] for key in self._keys[entry]]
        ahead = [] if following is None else self._rows[following]
        rows = self._gathered.use(entry, self._rows[entry], ahead)
        table = dict(self._resident)
        for bucket, row in zip(self._rows[entry], rows, strict=True):
            group = self.weights.by_name[bucket[0]]
            values: Sequence[Tensor] = [group.whole(row, leaf) for leaf in group.leaves]
            if torch.is_grad_enabled():
                values = _Load.apply(self._tokens[bucket], self, bucket, row)
            for leaf, value in zip(group.leaves, values, strict=True):
                table[leaf.path, group.layer(bucket[1])] = value
        return [table[key] for key in self._keys[entry]]

    def inputs(self, entries: Sequence[Entry], without: set[Key]) -> dict[Key, Tensor]:
        """Return what a backward asks gradients of: leaves, and for gathered rows their tokens.

        Args:
            entries: of a stage.
            without: parameters whose gradients come another way.
        """
        out: dict[Key, Tensor] = {}
        for entry in entries:
            for key in self._keys[entry]:
                leaf = self._resident.get(key)
                if leaf is not None and leaf.requires_grad and key not in without:
                    out[key] = leaf
            for bucket in self._rows[entry]:
                out[f"row {bucket[0]}", bucket[1]] = self._tokens[bucket]
        return out

    @property
    def keep(self) -> Keep | None:
        """How a forward keeps gathered rows for its backward: as notes; None if there are none."""
        if not self.cuts or self.program.layout.remat.keep_weights:
            return None
        return _Notes(self)

    def _read(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Note):
            return saved
        own = self._rows[saved.entry]
        ahead = self._rows.get(self._before.get(saved.entry, saved.entry), [])
        row = self._gathered.use(saved.entry, own, ahead)[own.index(saved.bucket)]
        return row.as_strided(saved.shape, saved.stride, saved.offset)

    def _hook(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        grad, leaf.grad = leaf.grad, None
        self.add(self._key_of[id(leaf)], grad)

    def add(self, key: Key, grad: Tensor, *, arrivals: int = 1) -> None:
        """Add a gradient that did not come through autograd's leaf.

        Args:
            key: the parameter.
            grad: of the local whole leaf.
            arrivals: of how many entries it completes the sum; 0 if more is to come.
        """
        place = self._places[key]
        self.sums.add(place.bucket, place.leaf, grad, arrivals=self._arrivals(key, arrivals))

    def add_product(
        self,
        keys: Sequence[Key],
        product: DeferredWeight,
        x: Tensor,
        g: Tensor,
        *,
        arrivals: Sequence[int] | None = None,
    ) -> None:
        """Add the gradients of the weights of a product.

        Args:
            keys: the weights; several lie side by side.
            product: what it is.
            x: its other operand.
            g: the cotangent of its result.
            arrivals: of how many entries it completes each weight's sum; None for one each.
        """
        arrivals = [1] * len(keys) if arrivals is None else arrivals
        arrived = [self._arrivals(key, n) for key, n in zip(keys, arrivals, strict=True)]
        places = [self._places[key] for key in keys]
        factors = product.factors(x, g)
        if factors is None:
            (place,) = places
            grad = weight_gradient(product, x, g)
            self.sums.add(place.bucket, place.leaf, grad, arrivals=arrived[0])
            return
        leaves = [place.leaf for place in places]
        self.sums.add_product(places[0].bucket, leaves, *factors, arrivals=sum(arrived))

    def _arrivals(self, key: Key, entries: int) -> int:
        """Return how many arrivals the sum over so many entries is (see `count_uses`)."""
        return min(entries, 1) if key in self._resident else entries

    def begin(self, num_microbatches: int) -> None:
        """Start a step."""
        self.sums.begin(num_microbatches)

    def finish(self) -> None:
        """End a step: every gradient is reduced into its storage."""
        self._gathered.release()
        self.sums.finish()


class _Again(NamedTuple):
    """Leaves in the order in which a second run and its backward need them."""

    leaves: Leaves
    following: Mapping[Entry, Entry | None]

    def __getitem__(self, entry: Any) -> Any:
        return self.leaves.load(entry, self.following[entry])


class _Notes(Keep):
    """Keeps a note instead of a view of a gathered row."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves

    def pack(self, x: Tensor) -> Any:
        """Return a note for a view of a gathered row, anything else as it is."""
        return self.leaves._gathered.note(x)

    def unpack(self, kept: Any) -> Tensor:
        """Return the view, of a row that is gathered again if need be."""
        return self.leaves._read(kept)


class _Note(NamedTuple):
    """What is saved instead of a view of a gathered row."""

    entry: Entry
    bucket: Bucket
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Gathered:
    """Rows that are whole at the moment, and those on their way."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.here: dict[Bucket, Tensor] = {}
        self.coming: dict[Bucket, Wait] = {}
        self.entry: Entry | None = None
        self.version = weights.version

    def use(
        self, entry: Entry | None, rows: Sequence[Bucket], ahead: Sequence[Bucket]
    ) -> list[Tensor]:
        """Return whole rows for an entry, start on those ahead, and give up all others."""
        self.entry = entry
        if self.version != self.weights.version:
            self.version = self.weights.version
            self.release()  # they are of weights before an update
        for bucket in list(self.here):
            if bucket not in rows and bucket not in ahead:
                del self.here[bucket]
        for bucket in list(self.coming):
            if bucket not in rows and bucket not in ahead:
                self.coming.pop(bucket)()
        for bucket in rows:
            if bucket not in self.here:
                wait = self.coming.pop(bucket, None) or self.weights.gather(bucket)
                self.here[bucket] = wait()
        for bucket in ahead:
            if bucket not in self.here and bucket not in self.coming:
                self.coming[bucket] = self.weights.gather(bucket)
        return [self.here[bucket] for bucket in rows]

    def release(self) -> None:
        """Give up all rows."""
        self.here.clear()
        for wait in self.coming.values():
            wait()  # every gather that began must end, on every rank
        self.coming.clear()

    def note(self, x: Tensor) -> Tensor | _Note:
        """Return a note for a view of a row that is here, anything else as it is."""
        at = x.untyped_storage().data_ptr()
        for bucket, row in self.here.items():
            if row.untyped_storage().data_ptr() == at:
                assert self.entry is not None
                offset = int(x.storage_offset())
                return _Note(self.entry, bucket, tuple(x.shape), x.stride(), offset)
        return x


class _Load(torch.autograd.Function):
    """A gathered row as parameters; the backward hands their gradients to the sums."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, leaves: Leaves, bucket: Bucket, row: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.leaves, ctx.bucket = leaves, bucket
        group = leaves.weights.by_name[bucket[0]]
        return tuple(group.whole(row, leaf) for leaf in group.leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        group = ctx.leaves.weights.by_name[ctx.bucket[0]]
        for leaf, grad in zip(group.leaves, grads, strict=True):
            if grad is not None:
                ctx.leaves.sums.add(ctx.bucket, leaf, grad)
        return None, None, None, None


def entries_of(program: ModelProgram, comm: RankComm) -> list[Entry]:
    """Return the (unit, layer index) that a rank runs, in order."""
    rank = comm.coords.get(PIPELINE, 0)
    return [
        (name, index)
        for (name, index, _), stage in zip(program.order, program.stages, strict=True)
        if program.stage_rank[stage] == rank
    ]


def keys_of(program: ModelProgram, entry: Entry) -> list[Key]:
    """Return the parameters of an entry, in the program's order."""
    name, index = entry
    return [
        (path, index if path.startswith(f"{name}.") else None)
        for path in program.units[name].leaves.values()
    ]


def count_uses(program: ModelProgram, comm: RankComm, groups: Sequence[Group]) -> dict[Bucket, int]:
    """Return how many gradients of a row arrive per microbatch.

    One per leaf and stage, as autograd adds up a leaf's uses; of a row that is stored cut one per
    leaf and entry, as every entry gathers its own.
    """
    rank = comm.coords.get(PIPELINE, 0)
    places: dict[Key, list[tuple[int, Entry]]] = {}
    for (name, index, _), stage in zip(program.order, program.stages, strict=True):
        if program.stage_rank[stage] == rank:
            for key in keys_of(program, (name, index)):
                places.setdefault(key, []).append((stage, (name, index)))

    def count(group: Group, key: Key) -> int:
        cut = group.num_parts("params") > 1
        return len({entry if cut else stage for stage, entry in places[key]})

    return {
        (group.name, row): sum(count(group, (leaf.path, group.layer(row))) for leaf in group.leaves)
        for group in groups
        for row in range(group.num_rows)
    }


def added_by_products(
    program: ModelProgram, groups: Sequence[Group], precision: Precision
) -> frozenset[str]:
    """Return the leaves whose gradients products add by themselves, where products make them.

    Those are added up in a dtype wider than their own, and belong to one entry each: of a leaf
    that several entries use autograd makes one gradient per stage, and that is what is counted.
    """
    entries = [(name, index) for name, index, _ in program.order]
    uses = Counter(key for entry in entries for key in keys_of(program, entry))
    shared = {path for (path, _), count in uses.items() if count > 1}
    return frozenset(
        leaf.path
        for group in groups
        if group.trained and precision.widens(group.dtype)
        for leaf in group.leaves
        if leaf.path not in shared
    )


def held_groups(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """Return the sets of pipeline ranks that hold a leaf together, in a fixed order."""
    return sorted({group.holders for group in groups if group.holders})
