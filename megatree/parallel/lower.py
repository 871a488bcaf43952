"""`lower`: from a global-view function and a layout to one rank's program."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, fx

from megatree.functional.param import Array, Param, padded_shape
from megatree.functional.tree import flatten_with_paths, path_name
from megatree.parallel.errors import ShardingError
from megatree.parallel.hazards import refuse_stray
from megatree.parallel.layout import Layout
from megatree.parallel.peephole import localise_iotas
from megatree.parallel.program import Program
from megatree.parallel.tracer import Tracer
from megatree.parallel.typed import Tracing, TypedTensor
from megatree.parallel.types import ShardType, make_type
from megatree.parallel.widen import leaf_needs, push_up, widen

Abstract = Param | Array | ShardType


@dataclass
class Traced:
    """A typed graph before the `widen` pass."""

    name: str
    graph: fx.Graph
    layout: Layout
    in_tree: optree.PyTreeSpec
    out_tree: optree.PyTreeSpec
    out_types: tuple[ShardType, ...]
    axis_names: frozenset[str]

    @property
    def needs(self) -> dict[str, frozenset[str]]:
        """Leaf path -> the mesh axes over which its uses in this program differ by rank."""
        return leaf_needs(self.graph)

    def finish(self, sync: Mapping[str, frozenset[str]] | None = None) -> Program:
        """Run `widen` and return the program; `sync` adds axes that other uses of a leaf need."""
        needs = {
            path: axes | (sync or {}).get(path, frozenset()) for path, axes in self.needs.items()
        }
        localise_iotas(self.graph)
        synced = widen(self.graph, self.layout.sizes, needs)
        self.graph.lint()
        types = {n.meta["path"]: n.meta["type"] for n in self.graph.nodes if n.op == "placeholder"}
        return Program(
            name=self.name,
            graph=self.graph,
            layout=self.layout,
            types=types,
            in_tree=self.in_tree,
            out_tree=self.out_tree,
            out_types=self.out_types,
            sync=synced,
            axis_names=self.axis_names,
        )


def lower(
    fn: Callable[..., Any],
    layout: Layout,
    *abstract: Any,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Program:
    """Trace a global-view function once and lower it to the program that every rank runs.

    Args:
        fn: a pure function of trees of tensors.
        layout: mesh and rules.
        abstract: per argument, a tree of Param (leaves to learn), Array or ShardType.
        sizes: axis name -> global size, for declarations without a shape.
        dtype: dtype of Params that name none.

    Returns:
        A Program: call it with a comm and local tensors, print it, or bind it.

    Raises:
        ShardingError: the function or the layout cannot be typed; the message names the line, the
            types and the smallest fix.

    Reference: DESIGN sections 2 and 3.
    """
    return trace(fn, layout, *abstract, sizes=sizes, dtype=dtype).finish()


def trace(
    fn: Callable[..., Any],
    layout: Layout,
    *abstract: Any,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    tracer: Tracer | None = None,
) -> Traced:
    """Trace and type a function; see `lower`."""
    tracer = tracer or Tracer(layout)
    paths, leaves, in_tree = flatten_with_paths(abstract)
    inputs = []
    arguments = argument_names(fn, len(abstract))
    for path, leaf in zip(paths, leaves, strict=True):
        name = path_name((arguments[path[0]], *path[1:]))
        inputs.append(add_input(tracer, name, leaf, sizes or {}, dtype))
    with Tracing(tracer):
        out = fn(*optree.tree_unflatten(in_tree, inputs))
        flat, out_tree = optree.tree_flatten(out)
        flat = [tracer.finish(_check_output(fn, x, tracer)) for x in flat]
    tracer.open = False
    tracer.graph.output(tuple(x.node for x in flat))
    push_up(tracer.graph)
    return Traced(
        name=getattr(fn, "__name__", "program"),
        graph=tracer.graph,
        layout=layout,
        in_tree=in_tree,
        out_tree=out_tree,
        out_types=tuple(x.type_ for x in flat),
        axis_names=frozenset(tracer.bound),
    )


def argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """Return the names of a function's arguments, numbered where it has none."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        named = [p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds]
    except ValueError:  # a builtin, such as torch.tanh
        named = []
    return [*named, *(f"arg{i}" for i in range(len(named), count))]


def add_input(
    tracer: Tracer, name: str, leaf: Abstract, sizes: Mapping[str, int], dtype: torch.dtype
) -> TypedTensor:
    """Add the placeholder of one declared input."""
    if isinstance(leaf, ShardType):
        return tracer.placeholder(name, leaf, None, leaf=False)
    if not isinstance(leaf, Param | Array):
        raise ShardingError(
            f"{name}: {type(leaf).__name__} is no declaration. Give a Param, an Array or a "
            f"ShardType."
        )
    shape = padded_shape(leaf, sizes, name)
    if len(shape) != len(leaf.names):
        raise ShardingError(
            f"{name}: declared {leaf.axes!r}, which names {len(leaf.names)} axes; the array has "
            f"{len(shape)} dims {shape}. Give one name per dim."
        )
    spec = tracer.layout.spec(leaf.names, shape, name)
    leaf_dtype = leaf.dtype or dtype
    learned = isinstance(leaf, Param) and leaf_dtype.is_floating_point
    grad = (learned and leaf.trained) or (isinstance(leaf, Array) and leaf.grad)
    permuted = tracer.layout.permuted(leaf.names)
    if permuted and isinstance(leaf, Param):
        raise ShardingError(
            f"{name}: the Param {leaf.axes!r} has an axis in the layout's {tracer.layout.order}. "
            "Give its axis another name."
        )
    ty = make_type(shape, leaf_dtype, spec, tracer.mesh_sizes, grad=grad, permuted=permuted)
    return tracer.placeholder(name, ty, leaf.names, leaf=learned)


def _check_output(fn: Callable[..., Any], x: Any, tracer: Tracer) -> TypedTensor:
    if isinstance(x, TypedTensor):
        refuse_stray(tracer, "return", x)
        return x
    kind = f"a plain tensor {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
    raise ShardingError(
        f"{getattr(fn, '__name__', 'program')}: returns {kind}, which does not follow from its "
        "inputs. Return values computed from the arguments."
    )
