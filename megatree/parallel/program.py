"""A lowered program: a graph over local tensors with its types, collectives and gradient syncs."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import optree
from torch import Tensor, fx

from megatree.parallel.bodies import run_body
from megatree.parallel.codegen import generate
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import Layout, local_shape
from megatree.parallel.nodes import is_move, move_args
from megatree.parallel.scoped import scoped_op
from megatree.parallel.transitions import Step, plan_move
from megatree.parallel.types import ShardType


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Args:
        source: line of the user's program ("gpt.py:88").
        kind: "psum", "all_gather", "psum_scatter", "all_to_all", ...
        axes: mesh axes, outer to inner.
        bytes: size of one rank's larger side, in bytes.
        phase: "forward", "backward" or "sync" (once per optimizer step).
    """

    source: str
    kind: str
    axes: tuple[str, ...]
    bytes: int
    phase: str


@dataclass(frozen=True)
class Program:
    """A function lowered to one rank's program; the same for every rank.

    Args:
        name: the function's name.
        graph: over local tensors; every node has a type, a source line and an op name.
        layout: what it was lowered for.
        types: input name -> type, in call order.
        in_tree, out_tree: structures of the arguments and of the result.
        out_types: types of the flat results.
        sync: leaf path -> mesh axes over which its gradient is a pending sum.
        axis_names: the logical axes the function names.
    """

    name: str
    graph: fx.Graph
    layout: Layout
    types: Mapping[str, ShardType]
    in_tree: optree.PyTreeSpec
    out_tree: optree.PyTreeSpec
    out_types: tuple[ShardType, ...]
    sync: Mapping[str, tuple[str, ...]]
    axis_names: frozenset[str]

    def bind(self, comm: RankComm) -> Callable[..., tuple[Tensor, ...]]:
        """Return the rank's function of flat local tensors; the result is a flat tuple."""
        return generate(self.graph, comm)

    def __call__(self, comm: RankComm, *args: Any) -> Any:
        """Run on one rank's local tensors, given as the trees the program was lowered for."""
        flat, tree = optree.tree_flatten(cast(Any, args))
        if tree != self.in_tree:
            raise ValueError(f"{self.name}: called with {tree}, lowered for {self.in_tree}.")
        return optree.tree_unflatten(self.out_tree, self.bind(comm)(*flat))

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Mesh axis -> size, as types see it."""
        return self.layout.sizes

    @property
    def collectives(self) -> list[Collective]:
        """Every collective, forward then backward then the hoisted gradient syncs."""
        forward: list[Collective] = []
        backward: list[Collective] = []
        for node in self.graph.nodes:
            calls = self.collectives_of(node)
            forward += [call for call in calls if call.phase == "forward"]
            backward += [call for call in calls if call.phase == "backward"][::-1]
        sync = [
            Collective(path, "psum", axes, self._bytes(self.types[path]), "sync")
            for path, axes in self.sync.items()
            if axes
        ]
        return forward + backward[::-1] + sync

    def collectives_of(self, node: fx.Node) -> list[Collective]:
        """Return the collectives of one node, those of each phase in their order."""
        source = node.meta.get("source", "")
        out = [
            Collective(source, call.kind, call.axes, call.bytes, call.phase)
            for call in node.meta.get("calls", ())
        ]
        if is_move(node):
            _, src, dst = move_args(node)
            out += self._steps(plan_move(src, dst), src, source, "forward")
            if src.grad:
                dual = plan_move(dst.dual, src.dual)
                out += self._steps(dual, dst, source, "backward")
        return out

    @property
    def table_axes(self) -> set[tuple[str, ...]]:
        """Tuples of mesh axes over which ops and bodies communicate by themselves."""
        return {
            axes
            for node in self.graph.nodes
            if node.target in (scoped_op, run_body)
            for axes in node.args[1].values()
            if axes
        }

    def counts(self, phase: str) -> dict[str, int]:
        """Return kind -> number of collectives of a phase."""
        out: dict[str, int] = {}
        for collective in self.collectives:
            if collective.phase == phase:
                out[collective.kind] = out.get(collective.kind, 0) + 1
        return out

    def _bytes(self, ty: ShardType) -> int:
        return math.prod(ty.local_shape(self.mesh_sizes)) * ty.dtype.itemsize

    def _steps(
        self, steps: tuple[Step, ...], src: ShardType, source: str, phase: str
    ) -> list[Collective]:
        out = []
        shape = list(local_shape(src.spec, src.shape, self.mesh_sizes))
        for step in steps:
            n = math.prod(self.mesh_sizes[a] for a in step.axes)
            before = math.prod(shape)
            if step.kind in ("all_gather", "pad"):
                shape[step.dim] *= n
            elif step.kind in ("psum_scatter", "slice"):
                shape[step.dim] //= n
            elif step.kind == "all_to_all":
                shape[step.dim] *= n
                shape[step.to_dim] //= n
            if step.is_collective:
                size = max(before, math.prod(shape)) * src.dtype.itemsize
                out.append(Collective(source, step.kind, step.axes, size, phase))
        return out

    @property
    def cost(self) -> dict[str, int]:
        """Bytes moved per rank by kind of collective, forward and backward."""
        out: dict[str, int] = {}
        for collective in self.collectives:
            if collective.phase != "sync":
                out[collective.kind] = out.get(collective.kind, 0) + collective.bytes
        return out

    def explain(self) -> str:
        """Print the program: per op the source line, what it does and the type of its result."""
        rows = [f"{self.name} on {self.layout.mesh}"]
        for node in self.graph.nodes:
            if node.op == "placeholder":
                role = "leaf" if node.meta["leaf"] else "input"
                rows.append(f"  {role:<18} {node.meta['path']:<42} {node.meta['type']}")
            elif node.op == "call_function" and not _is_part(node):
                rows.append(self._row(node))
                if "note" in node.meta:
                    rows.append(f"  {'':<18}   {node.meta['note']}")
        for axes in sorted(set(self.sync.values())):
            if axes:
                leaves = ", ".join(path for path, over in self.sync.items() if over == axes)
                rows.append(f"  gradient sync over {'.'.join(axes)}: {leaves}")
        out = ", ".join(map(str, self.out_types))
        return "\n".join([*rows, f"  returns {out}"])

    def _row(self, node: fx.Node) -> str:
        what = node.meta["op"]
        if is_move(node):
            _, src, dst = move_args(node)
            forward = " + ".join(map(str, plan_move(src, dst))) or "-"
            backward = " + ".join(map(str, plan_move(dst.dual, src.dual))) or "-"
            moved = sum(
                c.bytes
                for c in self._steps(plan_move(src, dst), src, "", "")
                + self._steps(plan_move(dst.dual, src.dual), dst, "", "")
            )
            what = f"> {forward} | {backward if src.grad else '-'}"
            what += f"  [{_human(moved)}]" if moved else ""
        elif node.meta.get("calls"):
            sides = ["", ""]
            for call in node.meta["calls"]:
                side = call.phase == "backward"
                sides[side] += f" + {call.kind}({'.'.join(call.axes)})"
            what += f" > {sides[0][3:] or '-'} | {sides[1][3:] or '-'}"
        ty = node.meta["type"]
        types = ", ".join(map(str, ty)) if isinstance(ty, tuple) else str(ty)
        return f"  {node.meta['source']:<18} {what:<58} {types}"


def _is_part(node: fx.Node) -> bool:
    """Whether a node only takes one of several results of another."""
    return node.target is operator.getitem and isinstance(
        node.all_input_nodes[0].meta["type"], tuple
    )


def _human(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"
