"""Which leaves lie side by side: flat buffers whose rows are buckets of communication."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatree.functional.tree import flatten_with_names
from megatree.parallel.layout import spec_box
from megatree.parallel.model import ModelProgram
from megatree.parallel.siblings import in_order
from megatree.parallel.storage import LEVELS, Storage
from megatree.parallel.types import ShardType

Axes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf's place in a group's rows.

    Args:
        path: path in the model's parameters.
        start: first element in a row that holds whole leaves.
        shape: local shape for the maths (of one layer, in a stack).
        dim: the dim that storage cuts further.
    """

    path: str
    start: int
    shape: tuple[int, ...]
    dim: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def piece(self, parts: int) -> tuple[int, ...]:
        """Return the shape of one of so many parts."""
        return tuple(n // parts if d == self.dim else n for d, n in enumerate(self.shape))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Leaves of one unit that are synchronised alike: a buffer of one row per layer on this rank.

    A row lies in one of two orders. *Whole*: leaf after leaf. *Packed*: part after part, as many
    as storage makes of every leaf at its finest level (`num_parts("opt")`), and in each part a
    piece of every leaf; so a rank's part is one stretch, and a collective over a row needs no copy.

    Args:
        name: "blocks.dense:dp:1:True:float32" and such; unique.
        unit: the unit that owns the leaves.
        layers: index within its kind of the layer of each row; None for a unit outside a stack.
        leaves: in the order of a row.
        sync: mesh axes over which the gradients are summed.
        stored: axes that storage adds, per level.
        parts: the number of parts that they make, per level.
        copies: number of ranks of a stage that hold the same elements for the maths.
        holders: pipeline ranks that hold a copy, if several do (a tied leaf).
        rule: what an optimizer should know of the leaves.
        dtype: dtype of the leaves.
        trained: whether the leaves have gradients (see `Param`).
    """

    name: str
    unit: str
    layers: tuple[int, ...] | None
    leaves: tuple[Leaf, ...]
    sync: Axes
    stored: Storage
    parts: tuple[int, int, int]
    copies: int
    holders: tuple[int, ...]
    rule: Hashable
    dtype: torch.dtype
    trained: bool = True

    @property
    def num_rows(self) -> int:
        """The number of rows of the buffer."""
        return 1 if self.layers is None else len(self.layers)

    @property
    def row_size(self) -> int:
        """The number of elements of a row of whole leaves."""
        return sum(leaf.size for leaf in self.leaves)

    def axes(self, level: str) -> Axes:
        """Return the mesh axes that storage adds at a level ("params", "grads" or "opt")."""
        return getattr(self.stored, level)

    def num_parts(self, level: str) -> int:
        """Return the number of parts of a row at a level."""
        return self.parts[LEVELS.index(level)]

    def part_size(self, level: str) -> int:
        """Return the number of elements of a row that a rank stores at a level."""
        return self.row_size // self.num_parts(level)

    def allocate(
        self, dtype: torch.dtype, device: torch.device, *, level: str | None = None
    ) -> Tensor:
        """Return a zeroed buffer [rows, elements of a row at a level, or of whole leaves]."""
        size = self.row_size if level is None else self.part_size(level)
        return torch.zeros(self.num_rows, size, dtype=dtype, device=device)

    def layer(self, row: int) -> int | None:
        """Return the layer of a row."""
        return None if self.layers is None else self.layers[row]

    def whole(self, row: Tensor, leaf: Leaf) -> Tensor:
        """Return a leaf's view of a row of whole leaves."""
        return row[leaf.start : leaf.start + leaf.size].view(leaf.shape)

    def packed(self, row: Tensor, leaf: Leaf, parts: int = 1) -> Tensor:
        """Return a leaf's view of a packed row that is one of `parts` parts.

        Its shape is `leaf.piece(parts)` with the cut dim unflattened into (parts to come, size of
        the smallest piece); without parts to come, `leaf.piece(parts)`.
        """
        most = self.num_parts("opt")
        rest, piece = most // parts, leaf.piece(most)
        start, size = leaf.start // most, leaf.size // most
        if rest == 1:
            return row[start : start + size].view(piece)
        pieces = row.view(rest, -1)[:, start : start + size].unflatten(1, piece)
        return pieces.movedim(0, leaf.dim)

    def unflattened(self, x: Tensor, leaf: Leaf, parts: int = 1) -> Tensor:
        """Return a leaf, or one of `parts` parts of it, in the shape of its `packed` view."""
        rest = self.num_parts("opt") // parts
        return x if rest == 1 else x.unflatten(leaf.dim, (rest, -1))

    def rows(self, buffer: Tensor) -> Iterator[tuple[Leaf, int | None, Tensor]]:
        """Yield (leaf, layer index or None, view) for every leaf of rows of whole leaves."""
        for leaf in self.leaves:
            for row in range(self.num_rows):
                yield leaf, self.layer(row), self.whole(buffer[row], leaf)

    def pieces(self, buffer: Tensor) -> Iterator[tuple[Leaf, int | None, Tensor]]:
        """Yield (leaf, layer index or None, view) for every leaf of rows at the finest level."""
        most = self.num_parts("opt")
        for leaf in self.leaves:
            for row in range(self.num_rows):
                yield leaf, self.layer(row), self.packed(buffer[row], leaf, most)

    def piece_spec(self, ty: ShardType, leaf: Leaf) -> tuple[Axes, ...]:
        """Return what cuts each dim of a leaf at the finest level, outer to inner."""
        return tuple(
            (*axes, *self.stored.opt) if dim == leaf.dim else axes
            for dim, axes in enumerate(ty.spec)
        )

    def piece_box(
        self, ty: ShardType, leaf: Leaf, sizes: Mapping[str, int], coords: Mapping[str, int]
    ) -> tuple[tuple[int, int], ...]:
        """Return the (start, stop) per dim of a rank's piece of a leaf at the finest level."""
        return spec_box(self.piece_spec(ty, leaf), ty.shape, sizes, coords)

    def view(self, buffer: Tensor, leaf: Leaf) -> Tensor:
        """Return a leaf's view of rows of whole leaves: [rows, *shape] in a stack, else
        [*shape].
        """
        if self.layers is None:
            return self.whole(buffer[0], leaf)
        stride = (buffer.stride(0), *torch.empty(leaf.shape, device="meta").stride())
        offset = buffer.storage_offset() + leaf.start
        return buffer.as_strided((self.num_rows, *leaf.shape), stride, offset)


def decays_matrices(path: str, num_dims: int) -> bool:
    """Whether weight decay applies: to leaves of two dims or more, not to norms and biases."""
    return num_dims >= 2


def stored_cut(ty: ShardType, storage: Storage, sizes: Mapping[str, int]) -> tuple[int, Storage]:
    """Return the dim of a leaf that storage cuts, and the axes that cut it per level.

    Storage refines compute: axes that cut the leaf already are left out, the others go innermost
    on the first dim that divides by all of them, or by as many as some dim does.

    Args:
        ty: of the leaf (of one layer, in a stack).
        storage: in the mesh's atomic axes.
        sizes: mesh axis -> size.
    """
    free = {axis for axis, _ in ty.kinds}
    wanted = tuple(axis for axis in storage.opt if axis in free)
    local = ty.local_shape(sizes)
    for length in range(len(wanted), 0, -1):
        kept = wanted[:length]
        parts = math.prod(sizes[axis] for axis in kept)
        for dim, size in enumerate(local):
            if size % parts == 0:
                levels = (getattr(storage, level) for level in LEVELS)
                return dim, Storage(*(tuple(a for a in axes if a in kept) for axes in levels))
    return 0, Storage()


def pack(
    program: ModelProgram,
    *,
    rule: Callable[[str, int], Hashable] = decays_matrices,
    stage_rank: int = 0,
    storage: Storage | None = None,
) -> tuple[Group, ...]:
    """Plan the buffers of one pipeline rank: leaves of a unit with equal sync, storage and rule.

    A leaf that a segment of this rank borrows from a stage elsewhere has a copy here.

    Args:
        program: a lowered model.
        rule: (path, number of dims) -> what the optimizer should know.
        stage_rank: which pipeline rank.
        storage: in atomic axes; None takes the layout's.

    Returns:
        The groups, in order of execution.
    """
    sizes = program.layout.sizes
    storage = program.layout.stored if storage is None else storage
    owners = {
        path: name
        for name, u in program.units.items()
        for path in u.leaves.values()
        if path.startswith(f"{name}.")
    }
    held: dict[str, dict[str, set[int | None]]] = {}
    for (name, index, _), stage in zip(program.order, program.stages, strict=True):
        if program.stage_rank[stage] == stage_rank:
            for path in program.units[name].leaves.values():
                owner = owners[path]
                held.setdefault(owner, {}).setdefault(path, set()).add(
                    index if owner == name else None
                )
    found: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    for unit in program.units:
        for path in program.units[unit].leaves.values():
            if path not in held.get(unit, {}):
                continue
            ty = program.types[path]
            layers = tuple(sorted(i for i in held[unit][path] if i is not None)) or None
            copies = math.prod(sizes[axis] for axis, _ in ty.kinds)
            holders = program.holders(path, 0)
            holders = holders if layers is None and len(holders) > 1 else ()
            trained = ty.grad or not ty.dtype.is_floating_point
            dim, stored = stored_cut(ty, storage, sizes) if trained else (0, Storage())
            told = rule(path, len(ty.shape))
            key = (
                unit, layers, program.sync[path], stored, copies, holders, told, ty.dtype, trained
            )  # fmt: skip
            found.setdefault(key, []).append((path, dim))
    groups = tuple(_group(program, key, paths) for key, paths in found.items())
    assert len({group.name for group in groups}) == len(groups), "two rules print alike"
    return groups


def _group(program: ModelProgram, key: tuple[Any, ...], paths: list[tuple[str, int]]) -> Group:
    unit, layers, sync, stored, copies, holders, rule, dtype, trained = key
    sizes = program.layout.sizes
    start, leaves, dims = 0, [], dict(paths)
    for path in in_order(program, unit, dims):
        shape = program.types[path].local_shape(sizes)
        leaves.append(Leaf(path=path, start=start, shape=shape, dim=dims[path]))
        start += math.prod(shape)
    name = [unit, ".".join(sync) or "none", str(copies), str(rule), str(dtype)[6:]]
    name += [f"held by {holders}"] if holders else []
    name += [f"stored by {stored}"] if stored else []
    name += [] if trained else ["not trained"]
    parts = [math.prod(sizes[axis] for axis in getattr(stored, level)) for level in LEVELS]
    return Group(
        name=":".join(name),
        unit=unit,
        layers=layers,
        leaves=tuple(leaves),
        sync=sync,
        stored=stored,
        parts=(parts[0], parts[1], parts[2]),
        copies=copies,
        holders=holders,
        rule=rule,
        dtype=dtype,
        trained=trained,
    )


def views(groups: tuple[Group, ...], buffers: Mapping[str, Tensor], like: Any) -> Any:
    """Return the parameter-shaped tree of views of buffers of whole leaves (None for leaves of
    other stages).

    Args:
        groups: the plan.
        buffers: group name -> buffer.
        like: the model's tree of Param, for the structure.
    """
    table = {
        leaf.path: group.view(buffers[group.name], leaf)
        for group in groups
        for leaf in group.leaves
    }
    names, _, spec = flatten_with_names(like)
    return spec.unflatten([table.get(name) for name in names])
