"""Peephole: a rank makes its slice of an arange instead of slicing the whole one."""

from typing import cast

import torch
from torch import fx

from megatree.parallel.nodes import is_move, move_args
from megatree.parallel.scoped import factory, iota
from megatree.parallel.transitions import plan_move


def localise_iotas(graph: fx.Graph) -> None:
    """Replace slices of `torch.arange` by local ones, changing the graph in place."""
    for node in list(graph.nodes):
        if not is_move(node):
            continue
        source, src, dst = move_args(node)
        if source.target is not factory or source.args[0] is not torch.arange:
            continue
        steps = plan_move(src, dst)
        bounds = source.args[1:]
        if [step.kind for step in steps] != ["slice"] or not all(type(b) is int for b in bounds):
            continue
        whole = range(*cast(tuple[int, ...], bounds))
        with graph.inserting_before(node):
            local = graph.call_function(
                iota,
                (steps[0].axes, whole.start, whole.step, len(whole), source.kwargs["dtype"]),
            )
        local.meta.update(node.meta, op="arange")
        node.replace_all_uses_with(local)
        graph.erase_node(node)
