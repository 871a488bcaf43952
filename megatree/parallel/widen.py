"""The one pass: let a producer be R where any of its uses needs R, so that sums merge and move out."""

from collections.abc import Iterable, Mapping

from torch import fx

from megatree.parallel.comm import move
from megatree.parallel.transitions import only_widens
from megatree.parallel.types import I, R, ShardType


def is_move(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is move


def widening(node: fx.Node) -> frozenset[str]:
    """Return the axes over which a node is I -> R and nothing else; empty for other nodes."""
    return (only_widens(*node.args[1:3]) or frozenset()) if is_move(node) else frozenset()


def wanted(node: fx.Node) -> frozenset[str]:
    """Return the axes over which some use of a value is I -> R."""
    return frozenset().union(*(widening(user) for user in node.users))


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
        node.args = (*node.args[:2], new)
    back: fx.Node | None = None
    for user in list(node.users):
        if is_move(user):
            if user.args[2] == new:
                user.replace_all_uses_with(node)
                graph.erase_node(user)
            else:
                user.args = (node, new, user.args[2])
            continue
        if back is None:
            with graph.inserting_after(node):
                back = graph.call_function(move, (node, new, old))
            back.meta.update(type=old, source=node.meta["source"], op="move")
        user.replace_input_with(node, back)
