"""The debug driver: the user's own Python runs op by op on real local tensors while it is typed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import optree
import torch
from torch import Tensor

from megatree.functional.tree import flatten_with_paths
from megatree.parallel.bodies import run_body
from megatree.parallel.comm import RankComm, move
from megatree.parallel.layout import Layout
from megatree.parallel.lower import add_input, argument_names
from megatree.parallel.scoped import NEEDS_COMM
from megatree.parallel.sources import user_line
from megatree.parallel.tracer import Tracer
from megatree.parallel.typed import Tracing, TypedTensor, map_structure
from megatree.parallel.types import ShardType


class EagerTracer(Tracer):
    """A tracer that also executes: every typed tensor has a `value`, this rank's local tensor."""

    def __init__(self, layout: Layout, comm: RankComm) -> None:
        super().__init__(layout)
        self.comm = comm

    def emit(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        types: Sequence[ShardType],
        plains: Sequence[Tensor],
        *,
        op: str,
        single: bool = True,
    ) -> Any:
        """Add the call to the graph, run it, and check the local shapes against the types."""
        out = super().emit(target, args, kwargs, types, plains, op=op, single=single)
        local_args, local_kwargs = map_structure(local_value, (args, dict(kwargs)))
        needs_comm = target in NEEDS_COMM or target in (move, run_body)
        lead = (self.comm,) if needs_comm else ()
        result = target(*lead, *local_args, **local_kwargs)
        for typed, value in zip(
            (out,) if single else out, (result,) if single else result, strict=True
        ):
            expected = typed.type_.local_shape(self.mesh_sizes)
            assert tuple(value.shape) == expected, (
                f"{user_line()}: {op}: local shape {list(value.shape)}, type {typed.type_} says "
                f"{list(expected)}"
            )
            typed.value = value
        return out


def local_value(x: Any) -> Any:
    """Return the local tensor of a typed value; other things as they are."""
    return x.value if isinstance(x, TypedTensor) else x


def debug(
    fn: Callable[..., Any],
    layout: Layout,
    comm: RankComm,
    *values: Any,
    abstract: Sequence[Any],
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Run a global-view function eagerly on this rank's local tensors, typing every op as it runs.

    Breakpoints, prints and exceptions are those of the user's own Python: `x` is the typed value
    (global shape), `x.value` the local tensor. Nothing is hoisted: an I -> R move sums gradients
    in backward, so leaves' gradients need no sync. Same types and errors as `lower`.

    Args:
        fn: a pure function of trees of tensors.
        layout: mesh and rules.
        comm: this rank's collectives.
        values: per argument, a tree of local tensors.
        abstract: per argument, the tree of Param, Array or ShardType that declares them.
        sizes: axis name -> global size, for declarations without a shape.
        dtype: dtype of Params that name none.

    Returns:
        The result's tree of local tensors, with their autograd history.

    Raises:
        ShardingError: as `lower`.
        ValueError: a local tensor has not the shape that its declaration gives this rank.
    """
    tracer = EagerTracer(layout, comm)
    paths, leaves, tree = flatten_with_paths(tuple(abstract))
    flat = tree.flatten_up_to(cast(Any, values))
    names = argument_names(fn, len(abstract))
    inputs = []
    for path, leaf, value in zip(paths, leaves, flat, strict=True):
        name = ".".join([names[path[0]], *map(str, path[1:])])
        typed = add_input(tracer, name, leaf, sizes or {}, dtype)
        expected = typed.type_.local_shape(tracer.mesh_sizes)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{name}: the local tensor is {list(value.shape)}, {typed.type_} gives this rank "
                f"{list(expected)}. Pass this rank's piece."
            )
        typed.value = value
        inputs.append(typed)
    with Tracing(tracer):
        out = fn(*optree.tree_unflatten(tree, inputs))
        out = optree.tree_map(lambda x: tracer.finish(x) if isinstance(x, TypedTensor) else x, out)
    tracer.open = False
    return optree.tree_map(local_value, out)
