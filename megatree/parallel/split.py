"""Split backward: products with a weight hand out (input, cotangent) instead of a weight
gradient.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from megatree.functional.signature import Signature
from megatree.parallel.nodes import call as add_call
from megatree.parallel.program import Program
from megatree.parallel.types import ShardType


@dataclass(frozen=True)
class DeferredWeight:
    """One product whose weight gradient is computed later.

    Args:
        path: the program's name of the weight ("w.wq").
        x, y: types of the other operand and of the product.
        equation: einsum that turns (x, cotangent of y) into the weight's gradient.
    """

    path: str
    x: ShardType
    y: ShardType
    equation: str


class _SplitProduct(torch.autograd.Function):
    """A product; its backward gives the input gradient, and what the weight gradient needs.

    `slot_x` and `slot_y` carry no value: their "gradients" are x and the cotangent of y.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, slot_x: Tensor, slot_y: Tensor, call: Any, back: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.back = back
        return call(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        grad_x = torch.einsum(ctx.back, g, weight) if needed else None
        return grad_x, None, x, g, None, None


def split_product(
    x: Tensor,
    weight: Tensor,
    slot_x: Tensor,
    slot_y: Tensor,
    call: Callable[..., Tensor],
    back: str,
) -> Tensor:
    """Graph target: call a product so that its weight gradient is left for later."""
    return _SplitProduct.apply(x, weight.detach(), slot_x, slot_y, call, back)


def weight_gradient(deferred: DeferredWeight, x: Tensor, g: Tensor) -> Tensor:
    """Compute the gradient of a deferred weight."""
    return torch.einsum(deferred.equation, x, g)


def split_backward(program: Program) -> tuple[fx.Graph, tuple[DeferredWeight, ...]]:
    """Return a program's graph with deferred weight gradients, and which those are.

    The graph takes two more inputs per deferred product, its slots, after all others. A leaf is
    deferred if every use of it is a product with another value.

    Reference: Qi et al. 2023, "Zero bubble pipeline parallelism", section 2 (B and W).
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    found: list[DeferredWeight] = []
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        copies[node] = graph.node_copy(node)
    products = [n for n in program.graph.nodes if _deferrable(n) is not None]
    slots = {
        n: (graph.placeholder(f"slot_x{i}"), graph.placeholder(f"slot_y{i}"))
        for i, n in enumerate(products)
    }
    for pair in slots.values():
        for slot in pair:
            slot.meta.update(type=None, source="slot", op="input", leaf=False, path=slot.name)
    for node in program.graph.nodes:
        if node in slots:
            at = _deferrable(node)
            assert at is not None
            x, weight = _operands(node)[1 - at], _operands(node)[at]
            letters = _letters(node.meta["product"])
            x_text, w_text, y_text = letters[1 - at], letters[at], letters[2]
            call = _ordered(node, at)
            back = f"{y_text},{w_text}->{x_text}"
            copies[node] = add_call(
                graph, split_product, copies[x], copies[weight], *slots[node], call, back
            )
            copies[node].meta.update(node.meta)
            found.append(
                DeferredWeight(
                    path=weight.meta["path"],
                    x=x.meta["type"],
                    y=node.meta["type"],
                    equation=f"{x_text},{y_text}->{w_text}",
                )
            )
        elif node.op == "output":
            graph.output(tuple(copies[n] for n in node.args[0]))
        elif node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph, tuple(found)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.args if isinstance(a, fx.Node)]


def _deferrable(node: fx.Node) -> int | None:
    """Return which operand of a product is a leaf that only products use; None if there is none."""
    sig: Signature | None = node.meta.get("product")
    operands = _operands(node) if sig is not None else []
    if sig is None or len(operands) != 2 or len(sig.operands) != 2 or node.kwargs:
        return None
    if any(label is None for labels in (*sig.operands, *sig.outputs) for label in labels):
        return None
    for at, operand in enumerate(operands):
        users = list(operand.users)
        leaf = operand.op == "placeholder" and operand.meta["leaf"]
        if leaf and operands[0] is not operands[1] and all(u.meta.get("product") for u in users):
            return at
    return None


def _letters(sig: Signature) -> list[str]:
    """Spell a signature's labels as einsum letters: of both operands and of the output."""
    labels = list(dict.fromkeys(x for names in (*sig.operands, *sig.outputs) for x in names))
    letter = dict(zip(labels, string.ascii_letters, strict=False))
    return ["".join(letter[x] for x in names) for names in (*sig.operands, sig.outputs[0])]


def _ordered(node: fx.Node, weight_at: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the product as a function of (x, weight), whatever its operands' order and options."""
    target, args = node.target, node.args
    places = [i for i, a in enumerate(args) if isinstance(a, fx.Node)]

    def call(x: Tensor, weight: Tensor) -> Tensor:
        filled = list(args)
        filled[places[weight_at]], filled[places[1 - weight_at]] = weight, x
        return target(*filled)  # type: ignore[operator]

    return call
