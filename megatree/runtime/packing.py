"""Which leaves lie side by side: flat buffers whose rows are buckets of gradient communication."""

import math
from collections.abc import Callable, Mapping
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
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Leaves of one unit that are synchronised alike: a buffer of one row per layer.

    Args:
        name: "blocks.dense:dp" and such; unique.
        unit: the unit that owns the leaves.
        rows: number of layers (1 outside a stack).
        leaves: in the order of a row.
        sync: mesh axes over which the gradients are summed.
        copies: number of ranks that hold the same elements.
        decay: whether weight decay applies.
        stacked: whether the rows are layers of a stack.
        dtype: dtype of the leaves.
    """

    name: str
    unit: str
    rows: int
    leaves: tuple[Leaf, ...]
    sync: tuple[str, ...]
    copies: int
    decay: bool
    stacked: bool
    dtype: torch.dtype

    @property
    def row_size(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a zeroed buffer [rows, row_size]."""
        return torch.zeros(self.rows, self.row_size, dtype=dtype, device=device)

    def view(self, buffer: Tensor, leaf: Leaf) -> Tensor:
        """Return a leaf's view of a buffer: [rows, *shape] in a stack, else [*shape]."""
        rows = buffer[:, leaf.start : leaf.start + leaf.size].unflatten(1, leaf.shape or (1,))
        rows = rows.reshape(self.rows) if not leaf.shape else rows
        return rows if self.stacked else rows[0]


def decays_matrices(path: str, num_dims: int) -> bool:
    """Whether weight decay applies: to leaves of two dims or more, not to norms and biases."""
    return num_dims >= 2


def pack(
    program: ModelProgram, *, decays: Callable[[str, int], bool] = decays_matrices
) -> tuple[Group, ...]:
    """Plan the buffers of a model: leaves of a unit with equal sync, copies, decay and dtype.

    Args:
        program: a lowered model.
        decays: (path, number of dims) -> whether weight decay applies.

    Returns:
        The groups, in order of execution.
    """
    sizes = program.layout.mesh.sizes
    found: dict[tuple[Any, ...], list[tuple[str, tuple[int, ...]]]] = {}
    for unit in program.units.values():
        for path in unit.leaves.values():
            if not path.startswith(f"{unit.name}."):
                continue  # borrowed
            ty = program.types[path]
            uncut = [axis for axis, _ in ty.kinds]
            copies = math.prod(sizes[axis] for axis in uncut)
            key = (unit.name, program.sync[path], copies, decays(path, len(ty.shape)), ty.dtype)
            found.setdefault(key, []).append((path, ty.local_shape(sizes)))
    groups = []
    stacks = {name: [at for n, at, _ in program.order if n == name] for name in program.units}
    for (unit, sync, copies, decay, dtype), members in found.items():
        start, leaves = 0, []
        for path, shape in members:
            leaves.append(Leaf(path=path, start=start, shape=shape))
            start += math.prod(shape)
        stacked = stacks[unit][0] is not None
        parts = [unit, ".".join(sync) or "none", str(copies), "decay" if decay else "plain"]
        groups.append(
            Group(
                name=":".join(parts),
                unit=unit,
                rows=len(stacks[unit]) if stacked else 1,
                leaves=tuple(leaves),
                sync=sync,
                copies=copies,
                decay=decay,
                stacked=stacked,
                dtype=dtype,
            )
        )
    return tuple(groups)


def views(groups: tuple[Group, ...], buffers: Mapping[str, Tensor], like: Any) -> Any:
    """Return the parameter-shaped tree of views of buffers.

    Args:
        groups: the plan.
        buffers: group name -> buffer.
        like: the model's tree of Param, for the structure.
    """
    table = {
        leaf.path: group.view(buffers[group.name], leaf) for group in groups for leaf in group.leaves
    }
    names, _, spec = flatten_with_names(like)
    return spec.unflatten([table[name] for name in names])


def store(groups: tuple[Group, ...], buffers: Mapping[str, Tensor], tree: Any) -> None:
    """Copy a parameter-shaped tree of local tensors into buffers, in place."""
    names, leaves, _ = flatten_with_names(tree)
    table = dict(zip(names, leaves, strict=True))
    with torch.no_grad():
        for group in groups:
            for leaf in group.leaves:
                group.view(buffers[group.name], leaf).copy_(table[leaf.path])
