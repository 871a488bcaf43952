"""Products of one value with several weights as one product: their weights lie side by side."""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from megatree.functional.activations import swiglu, swiglu_halves
from megatree.functional.contraction import linear
from megatree.functional.triton_kernels import has_kernels
from megatree.parallel.nodes import call as add_call
from megatree.parallel.nodes import leaf_added_to, operands
from megatree.parallel.program import Program

if TYPE_CHECKING:
    from megatree.parallel.model import ModelProgram
    from megatree.parallel.packing import Group

_LINEAR, _SWIGLU = linear.rule.fn, swiglu.rule.fn  # type: ignore[attr-defined]
"""What a graph calls."""


class Siblings(NamedTuple):
    """Weights that go together, in the order of their products, and the biases added to those.

    Args:
        weights: their paths.
        biases: the paths of the biases; none, or one per weight.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()


def find_siblings(graph: fx.Graph) -> tuple[Siblings, ...]:
    """Return the sets of weights that a program can multiply as one.

    They multiply the same value, nothing else uses them, and the products meet in one call, of
    attention or of a gated activation. (On an H100 products of queries and keys that turn apart
    gain nothing: inductor fuses the cat of their gradients badly.) A weight with a bias is a set
    of its own if need be: one call makes the product and adds.
    """
    found: dict[tuple[Any, ...], list[tuple[fx.Node, fx.Node | None]]] = {}
    for node in graph.nodes:
        if node.target is not _LINEAR or not _is_own(operands(node)[1]):
            continue
        x, weight = operands(node)
        bias = _bias_of(node)
        end = next(iter(node.users)) if bias is not None else node
        meets = tuple(end.users)
        key = (x, meets, weight.meta["type"].dtype, bias is None)
        found.setdefault(key, []).append((weight, bias))
    return tuple(
        Siblings(
            tuple(weight.meta["path"] for weight, _ in pairs),
            tuple(bias.meta["path"] for _, bias in pairs if bias is not None),
        )
        for pairs in found.values()
        if len(pairs) > 1 or pairs[0][1] is not None
    )


def _is_own(node: fx.Node) -> bool:
    """Whether a node is a parameter that one call uses."""
    return node.op == "placeholder" and node.meta["leaf"] and len(node.users) == 1


def _bias_of(node: fx.Node) -> fx.Node | None:
    """Return the parameter that is added to a product at once, if there is one."""
    added = leaf_added_to(node)
    if added is None or not _is_own(right := added[1]):
        return None
    ty, weight = right.meta["type"], operands(node)[1].meta["type"]
    fits = ty.dtype == node.meta["type"].dtype and ty.shape == weight.shape[:-1]
    return right if fits else None


def in_order(program: "ModelProgram", unit: str, paths: Iterable[str]) -> list[str]:
    """Return leaves of a unit in an order in which siblings lie side by side."""
    given = dict.fromkeys(paths)
    set_of = {path: run for each in _leaf_sets(program, unit) for run in each for path in run}
    return list(dict.fromkeys(m for p in given for m in set_of.get(p, (p,)) if m in given))


def side_by_side(program: "ModelProgram", groups: Sequence["Group"]) -> dict[str, list[Siblings]]:
    """Return unit -> the sets of siblings that lie side by side, as the unit's program names them.

    Those that are told apart (by a learning rate of their own, say) do not.
    """
    out: dict[str, list[Siblings]] = {}
    for name, unit in program.units.items():
        runs = [tuple(leaf.path for leaf in group.leaves) for group in groups if group.unit == name]
        sets = zip(find_siblings(unit.program.graph), _leaf_sets(program, name), strict=True)
        out[name] = [
            local
            for local, named in sets
            if all(any(_follow(paths, run) for run in runs) for paths in named if paths)
        ]
    return out


def _leaf_sets(program: "ModelProgram", unit: str) -> list[Siblings]:
    """Return the sets of siblings of a unit, as the model names them."""
    leaves = program.units[unit].leaves
    return [
        Siblings(*(tuple(leaves[path.removeprefix("w.")] for path in paths) for paths in each))
        for each in find_siblings(program.units[unit].program.graph)
    ]


def _follow(paths: tuple[str, ...], run: tuple[str, ...]) -> bool:
    """Whether paths follow each other in a run."""
    return any(run[i : i + len(paths)] == paths for i in range(len(run)))


@dataclass(frozen=True)
class Joined:
    """A graph in which siblings are one input.

    Args:
        graph: of the program, with fewer inputs.
        inputs: per input of the graph, the numbers of the program's inputs it stands for.
    """

    graph: fx.Graph
    inputs: tuple[tuple[int, ...], ...]

    def __call__(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return the first inputs of the graph for the first inputs of the program."""
        return [
            leaves[at[0]] if len(at) == 1 else _Beside.apply(*(leaves[i] for i in at))
            for at in self.inputs
            if max(at) < len(leaves)
        ]


def join_siblings(program: Program, siblings: Iterable[Siblings]) -> Joined:
    """Return a program's graph with one product, and one input, for each set of siblings."""
    return _Joining(program, siblings).run()


class _Joining:
    """The making of a joined graph, node by node."""

    def __init__(self, program: Program, siblings: Iterable[Siblings]) -> None:
        self.program, self.graph = program, fx.Graph()
        self.set_of = {path: each for each in siblings for run in each for path in run}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.inputs: list[list[int]] = []
        self.whole: dict[tuple[str, ...], tuple[fx.Node, list[int]]] = {}
        self.products: dict[Siblings, fx.Node] = {}
        self.inside: set[fx.Node] = set()  # additions of biases whose results nobody sees

    def run(self) -> Joined:
        number = 0
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._input(node, number)
                number += 1
            elif node.op == "output":
                self.graph.output(tuple(self.copies[n] for n in node.args[0]))
            elif (each := self._set_of(node)) is not None:
                if each not in self.products:
                    self._multiply(node, each)
            elif node not in self.copies and node not in self.inside:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return Joined(self.graph, tuple(map(tuple, self.inputs)))

    def _set_of(self, node: fx.Node) -> Siblings | None:
        """Return the set of whose product a node is a part."""
        if node.target is not _LINEAR:
            return None
        return self.set_of.get(operands(node)[1].meta.get("path", ""))

    def _input(self, node: fx.Node, number: int) -> None:
        path = node.meta["path"]
        each = self.set_of.get(path)
        if each is None:
            self.copies[node] = self.graph.node_copy(node)
            self.inputs.append([number])
            return
        run = each.weights if path in each.weights else each.biases
        if run not in self.whole:
            whole = self.graph.placeholder("_".join(run).replace(".", "_"))
            whole.meta.update(node.meta, path="+".join(run), run=run)
            self.whole[run] = whole, [0] * len(run)
            self.inputs.append(self.whole[run][1])
        self.whole[run][1][run.index(path)] = number

    def _multiply(self, node: fx.Node, each: Siblings) -> None:
        """Add the product of a set; its parts stand for what the program made."""
        by_path = {n.meta["path"]: n for n in self.program.graph.nodes if n.op == "placeholder"}
        ends = [next(iter(by_path[path].users)) for path in each.biases or each.weights]
        bias = self.whole[each.biases][0] if each.biases else None
        weight = self.whole[each.weights][0]
        x = self.copies[operands(node)[0]]
        shapes = tuple(self._rows(path) for path in each.weights)
        rows = sum(math.prod(shape) for shape in shapes)
        meets = next(iter(ends[0].users), None)
        if meets is not None and meets.target is _SWIGLU and meets.args == tuple(ends):
            product = add_call(self.graph, linear_rows, x, weight, bias)
            product.meta.update(ends[0].meta, rows=rows)
            self.products[each] = product
            self.inside.update(ends)
            self.copies[meets] = add_call(self.graph, swiglu_halves, product)
            self.copies[meets].meta.update(meets.meta)
            return
        product = add_call(self.graph, linear_several, x, weight, bias, shapes)
        product.meta.update(node.meta, type=tuple(end.meta["type"] for end in ends), rows=rows)
        self.products[each] = product
        for at, end in enumerate(ends):
            self.copies[end] = add_call(self.graph, operator.getitem, product, at)
            self.copies[end].meta.update(end.meta)

    def _rows(self, path: str) -> tuple[int, ...]:
        """Return the local shape of a weight without the dim that is contracted."""
        return tuple(self.program.types[path].local_shape(self.program.layout.sizes)[:-1])


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Graph target: the product with every row of weights that lie side by side.

    Args:
        x: [..., d].
        weight: the elements of all weights, row after row.
        bias: the elements of all biases, or None.

    Returns:
        [..., rows].
    """
    bias = None if bias is None else bias.flatten()
    return torch.nn.functional.linear(x, weight.reshape(-1, x.shape[-1]), bias)


def linear_several(
    x: Tensor, weight: Tensor, bias: Tensor | None, shapes: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, ...]:
    """Graph target: products with weights that lie side by side.

    Args:
        x, weight, bias: as in `linear_rows`.
        shapes: of each weight, without d.

    Returns:
        Per weight [..., *shape].
    """
    if bias is not None and len(shapes) > 1 and has_kernels(x):
        return _Several.apply(x, weight, bias, shapes)
    return parts_of_rows(linear_rows(x, weight, bias), shapes)


def parts_of_rows(rows: Tensor, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Graph target: what `linear_rows` gives, cut by weights, as `linear_several` gives it."""
    parts = rows.split([math.prod(shape) for shape in shapes], -1)
    return tuple(
        part if len(shape) == 1 else part.unflatten(-1, shape)
        for part, shape in zip(parts, shapes, strict=True)
    )


class _Several(torch.autograd.Function):
    """`linear_several` with biases; one kernel puts the gradients of the parts side by side and
    adds them up for the biases.

    Inductor reads them twice: 4.9 of the 164 ms of a step of gpt-345m on an H100.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shapes: tuple[tuple[int, ...], ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, bias)
        return parts_of_rows(linear_rows(x, weight, bias), shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        from megatree.functional.beside_kernel import side_by_side_and_sums

        x, weight, bias = ctx.saved_tensors
        rows, of_bias = side_by_side_and_sums(
            [grad.reshape(*x.shape[:-1], -1).contiguous() for grad in grads]
        )
        flat, factor = rows.view(-1, rows.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x = (flat @ weight.view(-1, x.shape[-1])).view(x.shape)
        of_weight = (flat.t() @ factor).view(weight.shape)
        return of_x, of_weight, of_bias.to(bias.dtype).view(bias.shape), None


class _Beside(torch.autograd.Function):
    """Parameters that lie side by side in memory as one dim of all their elements."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        first = parts[0]
        start = end = first.storage_offset()
        for part in parts:
            same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            assert same, "siblings lie in different buffers"
            assert part.storage_offset() == end, "siblings do not lie side by side"
            end += part.numel()
        ctx.shapes = [part.shape for part in parts]
        # Not a view of the first part, which ends before this does.
        return first.new_empty(0).set_(first.untyped_storage(), start, (end - start,), (1,))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        parts = grad.split([math.prod(shape) for shape in ctx.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
