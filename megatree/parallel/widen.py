"""The one pass: let a producer be R where any of its uses needs R, so that sums merge and move
out.
"""

from collections.abc import Iterable, Mapping

from torch import fx

from megatree.parallel.bodies import run_body
from megatree.parallel.comm import move
from megatree.parallel.nodes import call, is_move, move_args, set_args
from megatree.parallel.transitions import only_widens
from megatree.parallel.types import I, R, S, ShardType


def widening(node: fx.Node) -> frozenset[str]:
    """Return the axes over which a node is I -> R and nothing else; empty for other nodes."""
    return (only_widens(*move_args(node)[1:]) or frozenset()) if is_move(node) else frozenset()


def wanted(node: fx.Node) -> frozenset[str]:
    """Return the axes over which some use of a value is I -> R."""
    return frozenset().union(*(widening(user) for user in node.users))


def push_up(graph: fx.Graph) -> None:
    """Move I -> R from the results of ops up to leaves and transitions, changing the graph in
    place.

    An op whose operands are all I over an axis may be computed with R operands and an R result
    instead. That is worth it if every operand that takes a gradient comes, through such ops, from
    a leaf (the sum then runs once per step), a transition that gathers the axis (the sum merges
    with the slice in its dual to a reduce-scatter), or a value that another use makes R anyway
    (one sum serves both: keys and values of heads that are not cut, beside queries that are).
    """
    for node in reversed(graph.nodes):
        if not _may_push(node):
            continue
        axes = frozenset(a for a in wanted(node) if _absorbs_above(node, a))
        if axes:
            for operand in _flowing(node):
                wide = operand.meta["type"].with_kinds(dict.fromkeys(axes, R))
                source = move_args(operand)[0] if widening(operand) else operand
                node.replace_input_with(operand, _moved(graph, source, wide, node))
            _retype(graph, node, node.meta["type"].with_kinds(dict.fromkeys(axes, R)))


def _may_push(node: fx.Node) -> bool:
    ty = node.meta.get("type")
    return (
        node.op == "call_function"
        and not is_move(node)
        and node.target is not run_body
        and isinstance(ty, ShardType)
        and ty.grad
    )


def _flowing(node: fx.Node) -> list[fx.Node]:
    """Return the operands that take a gradient."""
    types = [(operand, operand.meta["type"]) for operand in node.all_input_nodes]
    return [x for x, ty in types if not isinstance(ty, ShardType) or ty.grad]


def _absorbs_above(node: fx.Node, axis: str) -> bool:
    """Whether every operand of an op can be R over an axis at no communication of its own."""
    return node.meta["type"].state(axis) == I and all(
        _absorbs(operand, axis) for operand in _flowing(node)
    )


def _absorbs(node: fx.Node, axis: str) -> bool:
    ty = node.meta["type"]
    if not isinstance(ty, ShardType) or ty.state(axis) not in (I, R):
        return False
    if axis in wanted(node):
        return True
    if node.op == "placeholder":
        return node.meta["leaf"]
    if is_move(node):
        if widening(node):
            return ty.state(axis) == R or _absorbs(move_args(node)[0], axis)
        return ty.state(axis) == R or move_args(node)[1].state(axis) == S
    return _may_push(node) and (ty.state(axis) == R or _absorbs_above(node, axis))


def _moved(graph: fx.Graph, x: fx.Node, wide: ShardType, before: fx.Node) -> fx.Node:
    """Return the value under a wider type, by a transition that exists or a new one."""
    if x.meta["type"] == wide:
        return x
    for user in x.users:
        if is_move(user) and move_args(user)[2] == wide and user < before:
            return user
    with graph.inserting_before(before):
        out = call(graph, move, x, x.meta["type"], wide)
    out.meta.update(type=wide, source=before.meta["source"], op="move")
    return out


def leaf_needs(graph: fx.Graph) -> dict[str, frozenset[str]]:
    """Return leaf path -> the axes over which its uses differ by rank."""
    return {
        node.meta["path"]: wanted(node)
        for node in graph.nodes
        if node.op == "placeholder" and node.meta["leaf"]
    }


def widen(
    graph: fx.Graph, mesh_axes: Iterable[str], sync: Mapping[str, frozenset[str]]
) -> dict[str, tuple[str, ...]]:
    """Rewrite the graph so that leaves and transitions are R where a use is; remove dead nodes.

    A transition that becomes R turns a slice dual into a reduce-scatter; a leaf that becomes R
    leaves its sum to the runtime. Uses that want I read the value through the free R -> I, whose
    backward keeps coordinate 0. No communication is added anywhere.

    Args:
        graph: a traced graph, changed in place.
        mesh_axes: the mesh axes in mesh order.
        sync: leaf path -> axes over which the leaf must be R (the union over all its uses, in
            other programs too).

    Returns:
        Leaf path -> the mesh axes over which its gradient is a pending sum, in mesh order.
    """
    synced: dict[str, tuple[str, ...]] = {}
    for node in list(graph.nodes):
        leaf = node.op == "placeholder" and node.meta["leaf"]
        if not leaf and (not is_move(node) or widening(node)):
            continue
        ty: ShardType = node.meta["type"]
        axes = sync.get(node.meta["path"], frozenset()) if leaf else wanted(node)
        axes = frozenset(axis for axis in axes if ty.state(axis) == I)
        if leaf:
            synced[node.meta["path"]] = tuple(axis for axis in mesh_axes if axis in axes)
        if axes:
            _retype(graph, node, ty.with_kinds(dict.fromkeys(axes, R)))
    graph.eliminate_dead_code()
    return synced


def _retype(graph: fx.Graph, node: fx.Node, new: ShardType) -> None:
    old: ShardType = node.meta["type"]
    node.meta["type"] = new
    if is_move(node):
        set_args(node, *move_args(node)[:2], new)
    back: fx.Node | None = None
    for user in list(node.users):
        if is_move(user):
            if move_args(user)[2] == new:
                user.replace_all_uses_with(node)
                graph.erase_node(user)
            else:
                set_args(user, node, new, move_args(user)[2])
            continue
        if back is None:
            with graph.inserting_after(node):
                back = call(graph, move, node, new, old)
            back.meta.update(type=old, source=node.meta["source"], op="move")
        user.replace_input_with(node, back)
