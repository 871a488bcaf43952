"""A program in pieces: runs of nodes that are computed again, and runs between them."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from megatree.parallel.again import Again, Keep, Results
from megatree.parallel.codegen import generate
from megatree.parallel.comm import RankComm
from megatree.parallel.nodes import is_move, move_args
from megatree.parallel.remat import Remat
from megatree.parallel.transitions import plan_move


def recomputed(remat: Remat, node: fx.Node) -> bool:
    """Whether a policy drops the results of a node of a layer's program and runs it again."""
    if remat.policy != "selective" or node.op != "call_function":
        return False
    if is_move(node):
        _, src, dst = move_args(node)
        kinds = {step.kind for step in plan_move(src, dst)}
        return remat.regather and src.grad and "all_gather" in kinds <= {"all_gather", "slice"}
    if node.meta.get("op") not in remat.op_names:
        return False
    calls = {call.kind for call in node.meta.get("calls", ()) if call.phase == "forward"}
    return calls <= ({"all_gather"} if remat.regather else set())


@dataclass(frozen=True)
class Piece:
    """A run of nodes.

    Args:
        graph: of these nodes; its inputs are `takes`, its results `gives`.
        takes, gives: nodes of the whole graph.
        again: whether the backward runs it again.
    """

    graph: fx.Graph
    takes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    again: bool


def cut_graph(graph: fx.Graph, again: Callable[[fx.Node], bool]) -> list[Piece]:
    """Cut a graph into maximal runs of nodes that are alike; parts of a tuple stay with it."""
    runs: list[tuple[bool, list[fx.Node]]] = []
    run_of: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if source in run_of:
            run = run_of[source]  # type: ignore[index]
        else:
            kind = again(node)
            if not runs or runs[-1][0] != kind:
                runs.append((kind, []))
            run = runs[-1][1]
        run.append(node)
        run_of[node] = run
    return [_piece(nodes, kind) for kind, nodes in runs]


def _piece(nodes: list[fx.Node], again: bool) -> Piece:
    inside = set(nodes)
    takes = tuple(dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside))
    gives = tuple(n for n in nodes if any(user not in inside for user in n.users))
    graph = fx.Graph()
    copies = {}
    for node in takes:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in gives))
    return Piece(graph, takes, gives, again)


class Pieces:
    """A program bound to a rank in pieces; called, it runs like the program.

    Args:
        graph: of the program.
        comm: the rank's collectives.
        remat: which nodes the backward computes again.
        transform: applied to every piece (torch.compile, say).
    """

    def __init__(
        self,
        graph: fx.Graph,
        comm: RankComm,
        remat: Remat,
        *,
        transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
    ) -> None:
        self.pieces = cut_graph(graph, partial(recomputed, remat))
        self._fns = [transform(generate(piece.graph, comm)) for piece in self.pieces]
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (end,) = (node for node in graph.nodes if node.op == "output")
        self._outputs: tuple[fx.Node, ...] = tuple(end.args[0])
        last: dict[fx.Node, int] = {}
        for number, piece in enumerate(self.pieces):
            last.update(dict.fromkeys(piece.takes, number))
        self._drops = [
            [n for n in piece.takes if last[n] == number and n not in self._outputs]
            for number, piece in enumerate(self.pieces)
        ]

    def __call__(self, *inputs: Tensor, keep: Keep | None = None) -> tuple[Tensor, ...]:
        """Run all pieces.

        Args:
            inputs: flat local tensors.
            keep: how what is not computed again waits for the backward.
        """
        values = dict(zip(self._inputs, inputs, strict=True))
        del inputs
        results = Results(keep or Keep())
        recording = torch.is_grad_enabled()
        for piece, fn, drops in zip(self.pieces, self._fns, self._drops, strict=True):
            taken = tuple(values[node] for node in piece.takes)
            for node in drops:
                del values[node]
            if not recording:
                given = fn(*taken)
            elif piece.again:
                call = Again(fn, keep=results, keep_made=Keep())
                given = call(*taken)
                results.add(call, taken, given)
            else:
                with results.hooks():
                    given = fn(*taken)
            values.update(zip(piece.gives, given, strict=True))
            del taken, given
        results.close()
        return tuple(values[node] for node in self._outputs)
