"""Which leaves lie side by side: flat buffers whose rows are buckets of gradient communication."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatree.functional.tree import flatten_with_names
from megatree.parallel.model import ModelProgram


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf's place in a group's rows.

    Args:
        path: path in the model's parameters.
        start: first element in a row.
        shape: local shape (of one layer, in a stack).
    """

    path: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Leaves of one unit that are synchronised alike: a buffer of one row per layer on this rank.

    Args:
        name: "blocks.dense:dp:1:decay" and such; unique.
        unit: the unit that owns the leaves.
        layers: index within its kind of the layer of each row; None for a unit outside a stack.
        leaves: in the order of a row.
        sync: mesh axes over which the gradients are summed.
        copies: number of ranks of a stage that hold the same elements.
        holders: pipeline ranks that hold a copy, if several do (a tied leaf).
        decay: whether weight decay applies.
        dtype: dtype of the leaves.
    """

    name: str
    unit: str
    layers: tuple[int, ...] | None
    leaves: tuple[Leaf, ...]
    sync: tuple[str, ...]
    copies: int
    holders: tuple[int, ...]
    decay: bool
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """The number of rows of the buffer."""
        return 1 if self.layers is None else len(self.layers)

    @property
    def row_size(self) -> int:
        """The number of elements of a row."""
        return sum(leaf.size for leaf in self.leaves)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a zeroed buffer [rows, row_size]."""
        return torch.zeros(self.num_rows, self.row_size, dtype=dtype, device=device)

    def row(self, buffer: Tensor, leaf: Leaf, row: int) -> Tensor:
        """Return the view of a leaf in one row of a buffer."""
        return buffer[row, leaf.start : leaf.start + leaf.size].view(leaf.shape)

    def rows(self, buffer: Tensor) -> Iterator[tuple[Leaf, int | None, Tensor]]:
        """Yield (leaf, layer index or None, view) for every leaf of every row of a buffer."""
        for leaf in self.leaves:
            for row in range(self.num_rows):
                layer = None if self.layers is None else self.layers[row]
                yield leaf, layer, self.row(buffer, leaf, row)

    def view(self, buffer: Tensor, leaf: Leaf) -> Tensor:
        """Return a leaf's view of a buffer: [rows, *shape] in a stack, else [*shape]."""
        if self.layers is None:
            return self.row(buffer, leaf, 0)
        stride = (buffer.stride(0), *torch.empty(leaf.shape, device="meta").stride())
        return buffer.as_strided((self.num_rows, *leaf.shape), stride, leaf.start)


def decays_matrices(path: str, num_dims: int) -> bool:
    """Whether weight decay applies: to leaves of two dims or more, not to norms and biases."""
    return num_dims >= 2


def pack(
    program: ModelProgram,
    *,
    decays: Callable[[str, int], bool] = decays_matrices,
    stage_rank: int = 0,
) -> tuple[Group, ...]:
    """Plan the buffers of one pipeline rank: leaves of a unit with equal sync, copies and decay.

    A leaf that a segment of this rank borrows from a stage elsewhere has a copy here.

    Args:
        program: a lowered model.
        decays: (path, number of dims) -> whether weight decay applies.
        stage_rank: which pipeline rank.

    Returns:
        The groups, in order of execution.
    """
    sizes = program.layout.sizes
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
    found: dict[tuple[Any, ...], list[str]] = {}
    for unit in program.units:
        for path in program.units[unit].leaves.values():
            if path not in held.get(unit, {}):
                continue
            ty = program.types[path]
            layers = tuple(sorted(i for i in held[unit][path] if i is not None)) or None
            copies = math.prod(sizes[axis] for axis, _ in ty.kinds)
            holders = program.holders(path, 0)
            holders = holders if layers is None and len(holders) > 1 else ()
            decay = decays(path, len(ty.shape))
            key = (unit, layers, program.sync[path], copies, holders, decay, ty.dtype)
            found.setdefault(key, []).append(path)
    return tuple(_group(program, key, paths) for key, paths in found.items())


def _group(program: ModelProgram, key: tuple[Any, ...], paths: list[str]) -> Group:
    unit, layers, sync, copies, holders, decay, dtype = key
    start, leaves = 0, []
    for path in paths:
        shape = program.types[path].local_shape(program.layout.sizes)
        leaves.append(Leaf(path=path, start=start, shape=shape))
        start += math.prod(shape)
    parts = [unit, ".".join(sync) or "none", str(copies), "decay" if decay else "plain"]
    parts.append(str(dtype).removeprefix("torch."))
    parts += [f"held by {holders}"] if holders else []
    return Group(
        name=":".join(parts),
        unit=unit,
        layers=layers,
        leaves=tuple(leaves),
        sync=sync,
        copies=copies,
        holders=holders,
        decay=decay,
        dtype=dtype,
    )


def views(groups: tuple[Group, ...], buffers: Mapping[str, Tensor], like: Any) -> Any:
    """Return the parameter-shaped tree of views of buffers (None for leaves of other stages).

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


def store(groups: tuple[Group, ...], buffers: Mapping[str, Tensor], tree: Any) -> None:
    """Copy a parameter-shaped tree of local tensors (all layers) into buffers, in place."""
    names, leaves, _ = flatten_with_names(tree)
    table = dict(zip(names, leaves, strict=True))
    with torch.no_grad():
        for group in groups:
            for leaf, layer, view in group.rows(buffers[group.name]):
                view.copy_(table[leaf.path] if layer is None else table[leaf.path][layer])
