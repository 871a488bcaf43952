"""Split backward: products with a weight hand out (input, cotangent) instead of a weight
gradient.
"""

import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from megatree.functional.signature import Signature
from megatree.parallel.biases import product_and_bias
from megatree.parallel.nodes import call as add_call
from megatree.parallel.siblings import linear_rows, linear_several, parts_of_rows


class Letters(NamedTuple):
    """The dims of a product, a letter each: of the other operand, the weight and the result."""

    x: str
    weight: str
    y: str

    @property
    def shared(self) -> str:
        """The letters of the rows (tokens) that operand and result share."""
        return "".join(c for c in self.y if c in self.x)

    def matrix(self) -> tuple[str, str] | None:
        """Return the letters of the weight's rows and of its columns as it lies in memory.

        None where the weight's gradient is no product of two matrices: a label in all three (a
        batch of experts), or dims of `x` and of `y` mixed.
        """
        of_x = {c for c in self.x if c not in self.y}
        of_y = {c for c in self.y if c not in self.x}
        if not of_x or not of_y or of_x | of_y != set(self.weight):
            return None
        for own in (of_x, of_y):
            if set(self.weight[: len(own)]) == own:
                return self.weight[: len(own)], self.weight[len(own) :]
        return None


@dataclass(frozen=True)
class DeferredWeight:
    """One product whose weight gradient is computed later.

    Args:
        paths: the program's names of the weights ("w.wq"); several lie side by side, and are the
            rows of one.
        x, y: local shapes of the other operand and of the product.
        dtype: of both.
        letters: of the product.
        alone: whether nothing else of its unit uses the weights.
    """

    paths: tuple[str, ...]
    x: tuple[int, ...]
    y: tuple[int, ...]
    dtype: torch.dtype
    letters: Letters
    alone: bool

    def factors(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return `a` [tokens, rows] and `b` [tokens, columns] so that `a.T @ b` is the gradient of
        the weight, a matrix; None if it is none (see `weight_gradient`).

        Args:
            x: the other operand.
            g: the cotangent of the product.
        """
        matrix = self.letters.matrix()
        if matrix is None:
            return None
        first, second = (
            (g, self.letters.y, own) if own[0] in self.letters.y else (x, self.letters.x, own)
            for own in matrix
        )
        shared = self.letters.shared
        return _flat(*first, shared=shared), _flat(*second, shared=shared)


def _flat(x: Tensor, letters: str, own: str, shared: str) -> Tensor:
    """Return a value as a matrix [shared letters, own letters]."""
    order = [letters.index(c) for c in shared + own]
    x = x if order == sorted(order) else x.permute(order)
    return x.reshape(math.prod(x.shape[: len(shared)]), -1)


class _SplitProduct(torch.autograd.Function):
    """A product; its backward gives the input gradient, and what the weight gradient needs.

    `slot_x` and `slot_y` carry no value: their "gradients" are x and the cotangent of y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slot_x: Tensor,
        slot_y: Tensor,
        call: Any,
        back: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.back = back
        ctx.bias_shape = None if bias is None else bias.shape
        return call(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, weight = ctx.saved_tensors
        grad_x = ctx.back(g, weight) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[2]:
            grad_bias = g.reshape(-1, math.prod(ctx.bias_shape)).sum(0).view(ctx.bias_shape)
        return grad_x, None, grad_bias, x, g, None, None


def split_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot_x: Tensor,
    slot_y: Tensor,
    call: Callable[..., Tensor],
    back: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Graph target: call a product so that its weight gradient is left for later.

    Args:
        x: the other operand.
        weight: whose gradient is left; nothing flows back to it.
        bias: added to the product in its last dims, with a gradient of its own; or None.
        slot_x, slot_y: what gets x and the cotangent of the product as "gradients".
        call: (x, weight, bias) -> the product.
        back: (cotangent, weight) -> the gradient of x.
    """
    return _SplitProduct.apply(x, weight, bias, slot_x, slot_y, call, back)


def weight_gradient(deferred: DeferredWeight, x: Tensor, g: Tensor) -> Tensor:
    """Compute the gradient of a deferred weight."""
    x_text, w_text, y_text = deferred.letters
    return torch.einsum(f"{x_text},{y_text}->{w_text}", x, g)


@dataclass(frozen=True)
class _Product:
    """A product with a leaf in a graph.

    Args:
        x, weight: the operands.
        bias: what is added to it, if it is joined with that.
        deferred: what is left of it.
        call: see `split_product`.
        parts: shapes that the result falls into, if it is that of several weights.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    deferred: DeferredWeight
    call: Callable[..., Tensor]
    parts: tuple[tuple[int, ...], ...] | None = None


def split_backward(
    graph: fx.Graph,
    sizes: Mapping[str, int],
    *,
    wanted: Callable[[DeferredWeight], bool] = lambda _: True,
) -> tuple[fx.Graph, tuple[DeferredWeight, ...]]:
    """Return a program's graph with deferred weight gradients, and which those are.

    The graph takes two more inputs per deferred product, its slots, after all others. A leaf is
    deferred if every use of it is a product with another value.

    Args:
        graph: of a program, or one with siblings joined and biases added by products (see
            `join_siblings`, `with_biases`).
        sizes: mesh axis -> size.
        wanted: which of the products to defer; of one weight all or none.

    Reference: Qi et al. 2023, "Zero bubble pipeline parallelism", section 2 (B and W).
    """
    out = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    found = {n: p for n in graph.nodes if (p := _product(n, sizes)) and wanted(p.deferred)}
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = out.node_copy(node)
    slots = {
        n: (out.placeholder(f"slot_x{i}"), out.placeholder(f"slot_y{i}"))
        for i, n in enumerate(found)
    }
    for pair in slots.values():
        for slot in pair:
            slot.meta.update(type=None, source="slot", op="input", leaf=False, path=slot.name)
    for node in graph.nodes:
        if node in found:
            product = found[node]
            bias = None if product.bias is None else copies[product.bias]
            values = (copies[product.x], copies[product.weight], bias, *slots[node])
            back = _input_gradient(product.deferred)
            copy = add_call(out, split_product, *values, product.call, back)
            copy.meta.update(node.meta)
            if product.parts is not None:
                copy = add_call(out, parts_of_rows, copy, product.parts)
                copy.meta.update(node.meta)
            copies[node] = copy
        elif node.op == "output":
            out.output(tuple(copies[n] for n in node.args[0]))
        elif node not in copies:
            copies[node] = out.node_copy(node, copies.__getitem__)
    return out, tuple(product.deferred for product in found.values())


def _product(node: fx.Node, sizes: Mapping[str, int]) -> _Product | None:
    """Return a node as a product with a leaf that only products use; None if it is none."""
    if node.op != "call_function":
        return None
    if node.target in (linear_rows, linear_several):
        return _joined_product(node, sizes)
    sig: Signature | None = node.meta.get("product")
    values = [a for a in node.args if isinstance(a, fx.Node)]
    bias = values.pop() if node.target is product_and_bias else None
    if sig is None or len(values) != 2 or len(sig.operands) != 2 or node.kwargs:
        return None
    if any(label is None for labels in (*sig.operands, *sig.outputs) for label in labels):
        return None
    at = next((i for i, value in enumerate(values) if _only_in_products(value)), None)
    if at is None or values[0] is values[1] or (bias is not None and at != 1):
        return None
    x, weight = values[1 - at], values[at]
    letters = _letters(sig)
    ty = x.meta["type"]
    deferred = DeferredWeight(
        (weight.meta["path"],),
        ty.local_shape(sizes),
        node.meta["type"].local_shape(sizes),
        ty.dtype,
        Letters(letters[1 - at], letters[at], letters[2]),
        len(weight.users) == 1,
    )
    call = _ordered(node, at) if bias is None else product_and_bias
    return _Product(x, weight, bias, deferred, call)


def _only_in_products(value: fx.Node) -> bool:
    """Whether a node is a trained leaf that only products use."""
    leaf = value.op == "placeholder" and value.meta["leaf"] and value.meta["type"].grad
    return leaf and all(user.meta.get("product") for user in value.users)


def _joined_product(node: fx.Node, sizes: Mapping[str, int]) -> _Product | None:
    """Return the product with weights that lie side by side: rows of one matrix."""
    x, weight, bias, *rest = node.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)  # noqa: PT018 (both alike)
    assert bias is None or isinstance(bias, fx.Node)
    if not weight.meta["type"].grad:
        return None
    shape = x.meta["type"].local_shape(sizes)
    tokens, column, row = string.ascii_letters[: len(shape) - 1], "y", "z"
    deferred = DeferredWeight(
        weight.meta["run"],
        shape,
        (*shape[:-1], node.meta["rows"]),
        x.meta["type"].dtype,
        Letters(tokens + column, row + column, tokens + row),
        len(weight.users) == 1,
    )
    parts: Any = rest[0] if rest else None
    return _Product(x, weight, bias, deferred, linear_rows, parts)


def _letters(sig: Signature) -> list[str]:
    """Spell a signature's labels as einsum letters: of both operands and of the output."""
    labels = list(dict.fromkeys(x for names in (*sig.operands, *sig.outputs) for x in names))
    letter = dict(zip(labels, string.ascii_letters, strict=False))
    return ["".join(letter[x] for x in names) for names in (*sig.operands, sig.outputs[0])]


def _ordered(node: fx.Node, weight_at: int) -> Callable[..., Tensor]:
    """Return the product as a function of (x, weight, None), whatever its operands' order and
    options.
    """
    target, args = node.target, node.args
    places = [i for i, a in enumerate(args) if isinstance(a, fx.Node)]

    def call(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        filled = list(args)
        filled[places[weight_at]], filled[places[1 - weight_at]] = weight, x
        return target(*filled)  # type: ignore[operator]

    return call


def _input_gradient(deferred: DeferredWeight) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (cotangent, weight) -> the gradient of the other operand.

    One product of matrices where it is one: torch.einsum takes bmm, and moves dims for it.
    """
    x_text, w_text, y_text = deferred.letters
    matrix = deferred.letters.matrix()
    if matrix is None:
        text = f"{y_text},{w_text}->{x_text}"
        return lambda g, weight: torch.einsum(text, g, weight)
    shared = deferred.letters.shared
    y_first = matrix[0][0] in y_text
    of_y, of_x = matrix if y_first else matrix[::-1]
    size = dict(zip(x_text, deferred.x, strict=True)) | dict(zip(y_text, deferred.y, strict=True))
    rows, of_x_size, of_y_size = (math.prod(size[c] for c in t) for t in (shared, of_x, of_y))
    shape = tuple(size[c] for c in shared + of_x)
    enters = tuple(y_text.index(c) for c in shared + of_y)
    leaves = tuple((shared + of_x).index(c) for c in x_text)

    def back(g: Tensor, weight: Tensor) -> Tensor:
        flat = g.permute(enters).reshape(rows, of_y_size)
        table = (
            weight.reshape(of_y_size, of_x_size)
            if y_first
            else weight.reshape(of_x_size, of_y_size).t()
        )
        return torch.mm(flat, table).view(shape).permute(leaves)

    return back
