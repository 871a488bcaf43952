"""Lower a whole model: one program per segment and block kind, with one sync per leaf."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import optree
import torch
from torch import fx

from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Array, Param, padded_shape, unstacked
from megatree.functional.tree import flatten_with_names, path_name
from megatree.parallel.errors import ShardingError, StrayValueError
from megatree.parallel.layout import Layout
from megatree.parallel.lower import Traced, trace
from megatree.parallel.nodes import op_names
from megatree.parallel.placement import Placement
from megatree.parallel.program import Program
from megatree.parallel.schedule.grid import grid
from megatree.parallel.tracer import Tracer
from megatree.parallel.types import ShardType


@dataclass(frozen=True)
class Unit:
    """A segment, or a block kind of a stack, lowered.

    Args:
        name: "embed", or "blocks.dense" for a kind of a stack.
        program: from flat (w, carry, consts) to flat (carry, out).
        leaves: local parameter name -> path in the model's parameters, in the program's order.
        terms: names of the loss terms in `out`, with the positions of (sum, weight) among the
            program's results.
        weights: program from the same inputs to the weights of the terms alone.
        metrics: names of other outputs and their positions.
        num_carry: number of tensors in the carry, which come first among the results.
    """

    name: str
    program: Program
    leaves: Mapping[str, str]
    terms: Mapping[str, tuple[int, int]]
    weights: fx.Graph | None
    metrics: Mapping[str, int]
    num_carry: int


@dataclass(frozen=True)
class ModelProgram:
    """A model lowered for a layout: values only, the same for every rank.

    Args:
        model: the chain.
        layout: mesh and rules.
        consts: program from the batch to the consts.
        const_names: names of the consts, in the order of the program's results.
        units: unit name -> Unit.
        order: (unit name, layer index within its kind or None, layer number) in execution order.
        sync: parameter path -> mesh axes over which its gradient is a pending sum.
        types: parameter path -> type of the leaf (of one layer, in a stack).
        stages: the stage of every entry of `order`.
        stage_rank: the pipeline rank that holds each stage.
    """

    model: Chain
    layout: Layout
    consts: Program
    const_names: tuple[str, ...]
    units: Mapping[str, Unit]
    order: tuple[tuple[str, int | None, int], ...]
    sync: Mapping[str, tuple[str, ...]]
    types: Mapping[str, ShardType]
    stages: tuple[int, ...]
    stage_rank: tuple[int, ...]

    def entries(self, stage: int) -> list[tuple[str, int | None, int]]:
        """Return the entries of `order` that a stage runs."""
        return [entry for entry, s in zip(self.order, self.stages, strict=True) if s == stage]

    def holders(self, path: str, index: int) -> tuple[int, ...]:
        """Return the pipeline ranks that hold a leaf (of layer `index` of its kind, in a stack)."""
        ranks = {
            self.stage_rank[stage]
            for (name, at, _), stage in zip(self.order, self.stages, strict=True)
            if path in self.units[name].leaves.values()
            and (at is None or not path.startswith(f"{name}.") or at == index)
        }
        return tuple(sorted(ranks))

    def carry_types(self, stage: int) -> tuple[ShardType, ...]:
        """Return the types of the flat carry that a stage hands on; one without layers passes it
        on.
        """
        before = [
            name for (name, _, _), s in zip(self.order, self.stages, strict=True) if s <= stage
        ]
        if not before:
            return ()
        unit = self.units[before[-1]]
        return unit.program.out_types[: unit.num_carry]

    def programs(self) -> Iterator[Program]:
        """Yield the consts' program and every unit's."""
        yield self.consts
        for unit in self.units.values():
            yield unit.program

    def explain(self, unit: str | None = None) -> str:
        """Print the programs, or that of one unit."""
        if unit is not None:
            return self.units[unit].program.explain()
        return "\n\n".join(program.explain() for program in self.programs())


def lower_model(model: Chain, layout: Layout) -> ModelProgram:
    """Lower every segment of a model for a layout.

    The carry's type is the same on both sides of every cut; a stack's block must return the type
    it takes. A leaf that several segments use is R over the union of what its uses need.

    Args:
        model: a chain.
        layout: mesh and rules.

    Returns:
        The programs, and per leaf its type and gradient sync.

    Raises:
        ShardingError: a segment cannot be typed, a rule names an axis that the model lacks, a
            block's carry changes its type, or a loss weight depends on parameters.
    """
    consts, const_names = _lower_consts(model, layout)
    const_types = dict(zip(const_names, consts.out_types, strict=True))
    traces: dict[str, tuple[Traced, dict[str, str]]] = {}
    order, stages = _placed(model, layout)
    carry: Any = None
    for name, segment in model.segments.items():
        if isinstance(segment, Stack):
            stack, carry = _trace_stack(model, layout, name, segment, carry, const_types)
            traces.update(stack)
        else:
            traces[name], carry = _trace_segment(model, layout, name, segment, carry, const_types)
    sync = _union_of_needs(traces)
    units = {name: _finish(name, *traced, sync) for name, traced in traces.items()}
    used = consts.axis_names.union(
        *(u.program.axis_names for u in units.values()), *(a.names for a in model.batch.values())
    )
    layout.check_names(set(used))
    _assert_cuts(order, units)
    layers = {name for name, index, _ in order if index is not None}
    layout.remat.check_ops({op for name in layers for op in op_names(units[name].program.graph)})
    return ModelProgram(
        model=model,
        layout=layout,
        consts=consts,
        const_names=const_names,
        units=units,
        order=order,
        sync={
            path: unit.program.sync[f"w.{local}"]
            for unit in units.values()
            for local, path in unit.leaves.items()
        },
        types={
            path: unit.program.types[f"w.{local}"]
            for unit in units.values()
            for local, path in unit.leaves.items()
        },
        stages=stages,
        stage_rank=layout.stage_rank,
    )


def _placed(
    model: Chain, layout: Layout
) -> tuple[tuple[tuple[str, int | None, int], ...], tuple[int, ...]]:
    """Return the links of the chain in execution order, and the stage of each."""
    order: list[tuple[str, int | None, int]] = []
    for name, segment in model.segments.items():
        if isinstance(segment, Stack):
            order += [
                (f"{name}.{kind}", index, number)
                for number, (kind, index) in enumerate(segment.layers())
            ]
        else:
            order.append((name, None, 0))
    is_layer = [index is not None for _, index, _ in order]
    stages = (layout.placement or Placement()).stages(is_layer, len(layout.stage_rank))
    return tuple(order), stages


def _assert_cuts(order: Sequence[tuple[str, int | None, int]], units: Mapping[str, Unit]) -> None:
    """Check that wherever a cut may lie, what leaves is what enters: I, R and P included.

    A gradient may be taken on one side alone: of a leaf that no parameter has reached yet.
    """
    for (left, _, _), (right, _, _) in pairwise(order):
        gives = units[left].program.out_types[: units[left].num_carry]
        takes = [ty for name, ty in units[right].program.types.items() if _is_carry(name)]
        assert [replace(ty, grad=True) for ty in gives] == [
            replace(ty, grad=True) for ty in takes
        ], f"{left} -> {right}: {gives} -> {takes}"


def _is_carry(name: str) -> bool:
    return name.split(".")[0] == "carry"


def _marked(model: Chain, layout: Layout, units: Sequence[str]) -> str:
    """Print the stages with their links, those of some units marked."""
    order, stages = _placed(model, layout)
    rows: list[list[str]] = [[] for _ in range(1 + max(stages))]
    marks: dict[str, tuple[int, int]] = {}
    for (name, index, number), stage in zip(order, stages, strict=True):
        marks.setdefault(name, (stage, len(rows[stage])))
        rows[stage].append(name if index is None else f"{name} {number}")
    return grid(rows, [marks[unit] for unit in units if unit in marks], label="stage")


def _lower_consts(model: Chain, layout: Layout) -> tuple[Program, tuple[str, ...]]:
    names: list[str] = []

    def consts(batch: Mapping[str, Any]) -> tuple[Any, ...]:
        table = model.consts(batch, model.cfg)
        names.extend(sorted(table))
        return tuple(table[name] for name in names)

    tracer = Tracer(layout, unit="consts")
    traced = trace(consts, layout, dict(model.batch), sizes=model.sizes, tracer=tracer)
    return traced.finish(), tuple(names)


def _trace_stack(
    model: Chain,
    layout: Layout,
    name: str,
    stack: Stack,
    carry: Any,
    consts: Mapping[str, ShardType],
) -> tuple[dict[str, tuple[Traced, dict[str, str]]], Any]:
    """Trace the kinds of a stack; a carry that takes a gradient after one layer takes it in all."""
    consts = {**consts, "layer": Array("", torch.int64)}  # type: ignore[dict-item]
    while True:
        traces, entry = {}, carry
        for kind in stack.params:
            unit = f"{name}.{kind}"
            traces[unit], after = _trace_segment(
                model, layout, unit, stack.kinds[kind], entry, consts
            )
            _check_fixed_point(unit, entry, after)
            carry = optree.tree_map(lambda a, b: replace(a, grad=a.grad or b.grad), carry, after)
        if carry == entry:
            return traces, carry


def _trace_segment(
    model: Chain,
    layout: Layout,
    name: str,
    segment: Segment,
    carry: Any,
    consts: Mapping[str, ShardType | Array],
) -> tuple[tuple[Traced, dict[str, str]], Any]:
    """Trace a segment; return the trace with its leaves' paths, and the carry's types after it."""
    w = dict(segment.params)
    leaves = {local: f"{name}.{local}" for local in flatten_with_names(dict(segment.params))[0]}
    for local, path in segment.borrows.items():
        w[local] = _declaration(model.params, path, name)
        leaves[local] = path
    apply = partial(_call, segment.apply, model.cfg)
    apply.__name__ = name  # type: ignore[attr-defined]
    tracer = Tracer(layout, _unpadded_sizes(model), unit=name)
    inputs = w, carry, dict(consts)
    try:
        traced = trace(apply, layout, *inputs, sizes=model.sizes, dtype=model.dtype, tracer=tracer)
    except StrayValueError as stray:
        text = f"{stray}\n{_marked(model, layout, (stray.maker, name))}"
        raise ShardingError(text) from None
    after, _ = optree.tree_unflatten(traced.out_tree, list(traced.out_types))
    return (traced, {local: leaves[local] for local in flatten_with_names(w)[0]}), after


def _unpadded_sizes(model: Chain) -> dict[str, int]:
    """Return the sizes that a name must have in every segment: those that no leaf pads."""
    names, leaves, _ = flatten_with_names(model.params)
    sizes = dict(model.sizes)
    for name, leaf in zip(names, leaves, strict=True):
        for axis, size in zip(leaf.names, padded_shape(leaf, model.sizes, name), strict=True):
            if sizes.get(axis, size) != size:
                del sizes[axis]
    return sizes


def _call(fn: Callable[..., Any], cfg: Any, w: Any, carry: Any, consts: Any) -> Any:
    return fn(w, carry, consts, cfg)


def _declaration(params: Mapping[str, Any], path: str, user: str) -> Param:
    names, leaves, _ = flatten_with_names(dict(params))
    table = dict(zip(names, leaves, strict=True))
    if path not in table:
        hint = difflib.get_close_matches(path, names, 1)
        meant = f" (did you mean {hint[0]!r}?)" if hint else ""
        raise ShardingError(
            f"{user}: borrows {path!r}, which the model does not have{meant}. "
            f"Leaves are {', '.join(names[:8])}."
        )
    leaf = table[path]
    return unstacked({"leaf": leaf})["leaf"] if leaf.stack is not None else leaf


def _check_fixed_point(unit: str, before: Any, after: Any) -> None:
    names, old, tree = flatten_with_names(before)
    if optree.tree_structure(after) != tree:
        raise ShardingError(
            f"{unit}: the carry enters as {tree} and leaves as {optree.tree_structure(after)}. "
            "Return a carry of the structure it came with."
        )
    for name, a, b in zip(names, old, optree.tree_leaves(after), strict=True):
        if (a.shape, a.dtype, a.spec, a.kinds) != (b.shape, b.dtype, b.spec, b.kinds):
            raise ShardingError(
                f"{unit}: the carry{name and f' {name}'} enters as {a} and leaves as {b}. End the "
                "block with shard(x, ...) over the axes it began with, in its dtype."
            )


def _union_of_needs(
    traces: Mapping[str, tuple[Traced, dict[str, str]]],
) -> dict[str, frozenset[str]]:
    """Return parameter path -> the axes that some use of it needs it R over."""
    sync: dict[str, frozenset[str]] = {}
    for traced, leaves in traces.values():
        for name, axes in traced.needs.items():
            path = leaves[name.removeprefix("w.")]
            sync[path] = sync.get(path, frozenset()) | axes
    return sync


def _finish(
    name: str, traced: Traced, leaves: dict[str, str], sync: Mapping[str, frozenset[str]]
) -> Unit:
    program = traced.finish({f"w.{local}": sync[path] for local, path in leaves.items()})
    paths, _, _ = optree.tree_flatten_with_path(
        optree.tree_unflatten(traced.out_tree, list(range(traced.out_tree.num_leaves)))
    )
    terms: dict[str, dict[int, int]] = {}
    metrics: dict[str, int] = {}
    for position, path in enumerate(paths):
        if path[0] == 1 and len(path) > 2 and path[1] == "terms":
            terms.setdefault(str(path[2]), {})[path[3]] = position
        elif path[0] == 1:
            metrics[path_name(path[1:])] = position
    pairs = {}
    for term, found in terms.items():
        types = [program.out_types[at] for at in found.values()]
        if set(found) != {0, 1} or any(ty.shape for ty in types):
            raise ShardingError(
                f"{name}: term {term!r} is {', '.join(map(str, types))}. A term is a pair "
                "(sum, weight) of scalars. Sum both over the batch: (loss.sum(), weight.sum())."
            )
        if not types[0].grad:
            raise ShardingError(
                f"{name}: term {term!r} does not depend on any parameter, so it has no gradient. "
                "Return it as a metric, beside terms."
            )
        pairs[term] = (found[0], found[1])
    return Unit(
        name=name,
        program=program,
        leaves=leaves,
        terms=pairs,
        weights=_weights_graph(name, program, pairs) if pairs else None,
        metrics=metrics,
        num_carry=sum(path[0] == 0 for path in paths),
    )


def _weights_graph(name: str, program: Program, terms: Mapping[str, tuple[int, int]]) -> fx.Graph:
    """Cut out of a program what computes the weights of its terms, from the consts alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(tuple(copies[node.args[0][weight]] for _, weight in terms.values()))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "placeholder" and node.users and not node.meta["path"].startswith("consts."):
            raise ShardingError(
                f"{name}: the weight of a loss term depends on {node.meta['path']!r}. "
                "Compute weights from the batch only; the step needs them before any backward."
            )
    return graph
