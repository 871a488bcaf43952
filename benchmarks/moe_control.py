"""The controls of a mixture of SwiGLU experts: layers written by hand in plain PyTorch.

Weights are a router [experts, d], the gates and ups of experts side by side, [experts, d, 2 f], and
their downs, [experts, f, d]. The router works in the dtype of the model.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""x [tokens, d], router, gates and ups, downs, k -> [tokens, d]."""


def _route(x: Tensor, router: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top, choice = (x @ router.t()).float().softmax(-1).topk(k, -1)
    return top / top.sum(-1, keepdim=True), choice


def _activate(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def loop(x: Tensor, router: Tensor, into: Tensor, down: Tensor, k: int) -> Tensor:
    """Look for the tokens of every expert, and add up what it makes of them."""
    gates, choice = _route(x, router, k)
    y = torch.zeros_like(x)
    for e in range(len(into)):
        token, rank = (choice == e).nonzero(as_tuple=True)
        made = _activate(x[token] @ into[e]) @ down[e]
        y.index_add_(0, token, made * gates[token, rank, None].to(x.dtype))
    return y


def _grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if x.is_cuda:
        return torch._grouped_mm(x, weights, offs=ends)
    parts = x.tensor_split(ends[:-1].tolist())
    return torch.cat([part @ w for part, w in zip(parts, weights, strict=True)])


def grouped(x: Tensor, router: Tensor, into: Tensor, down: Tensor, k: int) -> Tensor:
    """Sort the choices by expert, take grouped products, and add up by index."""
    gates, choice = _route(x, router, k)
    order = choice.flatten().argsort()
    ends = F.one_hot(choice.flatten(), len(into)).sum(0).cumsum(0).to(torch.int32)
    hidden = _activate(_grouped_product(x[order // k], into, ends))
    made = _grouped_product(hidden, down, ends) * gates.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // k, made)


def balanced(x: Tensor, router: Tensor, into: Tensor, down: Tensor, k: int) -> Tensor:
    """Give all experts as many rows without asking a router: batched products alone."""
    rows = x.repeat(k, 1).view(len(into), -1, x.shape[1])
    made = torch.bmm(_activate(torch.bmm(rows, into)), down)
    return made.view(k, *x.shape).sum(0)


def dense(x: Tensor, router: Tensor, into: Tensor, down: Tensor, k: int) -> Tensor:
    """Give one expert all rows: dense products of the same size, the ceiling."""
    return (_activate(x.repeat(k, 1) @ into[0]) @ down[0]).view(k, *x.shape).sum(0)


LAYERS: Mapping[str, Layer] = {
    "loop": loop,
    "grouped": grouped,
    "balanced": balanced,
    "dense": dense,
}
"""Name -> layer."""
