"""The tensor that a traced function sees: a global shape, a type, and no data."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from megatree.parallel.errors import ShardingError
from megatree.parallel.types import ShardType

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer


class TypedTensor(Tensor):
    """A value of a traced function: meta data of the whole array, its type and its graph node."""

    node: fx.Node
    type_: ShardType
    tracer: "Tracer"
    plain: Tensor
    value: Any

    @staticmethod
    def make(plain: Tensor, node: fx.Node, ty: ShardType, tracer: "Tracer") -> "TypedTensor":
        """Wrap a plain meta tensor of the global shape."""
        out = Tensor._make_subclass(TypedTensor, plain)
        out.plain, out.node, out.type_, out.tracer = plain, node, ty, tracer
        out.value = None
        return out

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operand = next((a for a in typed_leaves((args, kwargs or {}))), None)
        if operand is None:  # repr and such of a nested structure
            raise ShardingError(f"{func}: no typed operand. Pass typed tensors directly.")
        return operand.tracer.dispatch(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        local = "" if self.value is None else f", local {self.value!r}"
        return f"TypedTensor({self.type_}{local})"

    def __format__(self, format_spec: str) -> str:
        return format(repr(self), format_spec)


class Tracing(TorchFunctionMode):
    """While a function is traced: every torch call, factories included, goes to the tracer."""

    def __init__(self, tracer: "Tracer") -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.tracer.dispatch(func, args, kwargs or {})


def typed_leaves(tree: Any) -> list[TypedTensor]:
    """Return the typed tensors in nested tuples, lists, dicts and slices, in order."""
    out: list[TypedTensor] = []

    def visit(x: Any) -> Any:
        if isinstance(x, TypedTensor):
            out.append(x)
        return x

    map_structure(visit, tree)
    return out


def map_structure(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Map over the leaves of nested tuples, lists, dicts and slices, as fx sees arguments."""
    if isinstance(tree, tuple | list):
        mapped = [map_structure(fn, x) for x in tree]
        return tuple(mapped) if isinstance(tree, tuple) else mapped
    if isinstance(tree, dict):
        return {key: map_structure(fn, x) for key, x in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_structure(fn, x) for x in (tree.start, tree.stop, tree.step)))
    return fn(tree)
