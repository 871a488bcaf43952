"""Graph nodes with the types that their arguments have: fx itself knows only `Argument`."""

from collections.abc import Callable
from typing import Any, cast

from torch import fx

from megatree.parallel.comm import move
from megatree.parallel.types import ShardType


def is_move(node: fx.Node) -> bool:
    """Whether a node is a transition."""
    return node.op == "call_function" and node.target is move


def move_args(node: fx.Node) -> tuple[fx.Node, ShardType, ShardType]:
    """Return the value that a transition takes, and its types before and after."""
    return cast(tuple[fx.Node, ShardType, ShardType], node.args)


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return a node's arguments, of which the caller knows that they are nodes."""
    return cast(tuple[fx.Node, ...], node.args)


def set_args(node: fx.Node, *args: Any) -> None:
    """Replace a node's arguments."""
    node.args = args


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Add a call to a graph."""
    return graph.call_function(target, args)


def leaf_added_to(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the addition of a parameter that is all that becomes of a node, and the parameter."""
    if len(node.users) != 1:
        return None
    (end,) = node.users
    if end.meta.get("op") != "add" or len(end.args) != 2 or end.kwargs:
        return None
    left, right = end.args
    if left is not node or not isinstance(right, fx.Node) or not right.meta.get("leaf"):
        return None
    return end, right


def op_names(graph: fx.Graph) -> set[str]:
    """Return the names of a graph's ops that are neither products nor transitions."""
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_move(n)]
    return {n.meta["op"] for n in calls if not n.meta.get("product")}
