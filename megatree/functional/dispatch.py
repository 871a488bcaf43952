"""Tokens to their experts and back: the part of a mixture that moves rows between ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatree.functional.activations import swiglu
from megatree.functional.comm import Comm
from megatree.functional.experts import Products, expert_rows, expert_slots
from megatree.functional.local_map import Out, local_map
from megatree.functional.triton_kernels import has_kernels

_ADVICE = (
    "In rules, take the mesh axes of 'experts' from those of 'batch' and 'seq_moe'; a shared "
    "expert that is computed meanwhile is cut within as the others: shared_ffn by what cuts "
    "expert_ffn."
)


def experts(
    x: Float[Tensor, "batch seq_moe embed"],
    gates: Float[Tensor, "batch seq_moe k"],
    choice: Int[Tensor, "batch seq_moe k"],
    weights: Sequence[Tensor],
    *,
    shared: Sequence[Tensor] = (),
    capacity: int | None = None,
    activation: Callable[..., Tensor] = swiglu,
    products: Products = "auto",
) -> Any:
    """Return the sum over a token's choices of gate * expert(token).

    The mesh axes of `experts` must be among those that cut the tokens (`batch`, `seq_moe`): each
    rank then sends its rows to the ranks that hold their experts. Axes of `expert_ffn` must not be:
    the result is a pending sum over them.

    Args:
        x: laid out as "batch seq_moe embed".
        gates: weights of the choices, "batch seq_moe _".
        choice: experts of the tokens; the number of experts itself is no expert.
        weights: ([gate,] up, down), each "experts expert_ffn embed".
        shared: ([gate,] up, down), each "shared_ffn embed", of an expert that takes every token. It
            is computed while rows travel to the others, and in the backward while their gradients
            travel back. Axes of `shared_ffn` must not cut the tokens.
        capacity: None sorts rows by expert and sends as many as there are, at the cost of one
            look of the host at their numbers if experts are cut (a plan assumes even loads). A
            number says that no expert has more rows of one sequence: rows are padded to it, shapes
            are static and the host looks at nothing. Where a sequence is cut, each piece of it is
            padded to the whole capacity, or to its own length if that is less.
        activation: of (up), or of (gate, up) if there are three weights.
        products: see `expert_rows`; "loop" and "grouped" are for rows without padding.

    Returns:
        [batch, seq_moe, embed]; with `shared` a pair of it and what the shared expert gives, a
        pending sum over the axes of `shared_ffn`.
    """
    num_weights, num_experts = len(weights), weights[0].shape[0]

    def dispatch(comm: Comm, x: Tensor, gates: Tensor, choice: Tensor, *ws: Tensor) -> Any:
        own, others = ws[:num_weights], ws[num_weights:]
        meanwhile = (lambda: _dense(x, others, activation)) if others else None
        if capacity is None:
            y, beside = _dropless(comm, x, gates, choice, own, activation, products, meanwhile)
        else:
            y, beside = _capped(comm, x, gates, choice, own, activation, capacity, meanwhile)
        return y if beside is None else (y, beside)

    def flops(shapes: Sequence[tuple[int, ...]]) -> int:
        (batch, seq, embed), (*_, k), _, (_, ffn, _), *rest = shapes
        rows = batch * seq * k if capacity is None else num_experts * batch * min(capacity, seq)
        beside = sum(batch * seq * shape[0] for shape in rest[num_weights - 1 :])
        return 2 * embed * (rows * ffn * num_weights + beside)

    dispatch.__name__ = "experts"
    place = "batch seq_moe embed"
    routed = Out(place, partial=("expert_ffn",))
    body = local_map(
        dispatch,
        in_axes=(
            place,
            "batch seq_moe _",
            "batch seq_moe _",
            *("experts expert_ffn embed",) * num_weights,
            *("shared_ffn embed",) * len(shared),
        ),
        out_axes=(routed, Out(place, partial=("shared_ffn",))) if shared else routed,
        any_order=True,  # rows are sorted by expert, and a sum does not know where they lay
        flops=flops,
        advice=_ADVICE,
    )
    return body(x, gates, choice, *weights, *shared)


def _dense(x: Tensor, weights: Sequence[Tensor], activation: Callable[..., Tensor]) -> Tensor:
    """Return what an expert gives that takes every token."""
    return activation(*(x @ w.t() for w in weights[:-1])) @ weights[-1]


Meanwhile = Callable[[], Tensor] | None
"""What is computed while rows travel."""


def _dropless(
    comm: Comm,
    x: Tensor,
    gates: Tensor,
    choice: Tensor,
    weights: Sequence[Tensor],
    activation: Callable[..., Tensor],
    products: Products,
    meanwhile: Meanwhile,
) -> tuple[Tensor, Tensor | None]:
    if comm.axis_size("experts") > 1:
        return _across(comm, x, gates, choice, weights, activation, products, meanwhile)
    k, num_experts = choice.shape[-1], weights[0].shape[0]
    order, edges = _by_expert(choice, num_experts)
    place = _inverse(order)
    place = torch.where(place < edges[-1], place, len(order))  # dropped choices are sorted last
    rows = _Take.apply(x.reshape(-1, x.shape[-1]), order, place, k)
    mine = _Take.apply(gates.reshape(-1, 1), order, place, 1)
    even = [_share(len(order), num_experts, e) for e in range(num_experts)]
    counts = even if comm.plans or x.is_meta else edges.diff()  # the host need not know them
    y = expert_rows(rows, mine, counts, weights, activation, products=products)
    y = _Put.apply(y, order, place, k).view(x.shape)
    return y, meanwhile() if meanwhile else None


@torch.compiler.disable  # numbers of rows change with every call: each would be compiled anew
def _across(
    comm: Comm,
    x: Tensor,
    gates: Tensor,
    choice: Tensor,
    weights: Sequence[Tensor],
    activation: Callable[..., Tensor],
    products: Products,
    meanwhile: Meanwhile,
) -> tuple[Tensor, Tensor | None]:
    """Do what `_dropless` does where experts lie on several ranks."""
    n, local, k = comm.axis_size("experts"), weights[0].shape[0], choice.shape[-1]
    order, edges = _by_expert(choice, n * local)
    counts = edges.diff().view(n, local)
    arrive = comm.all_to_all(counts, "experts", 0, 0)
    if comm.plans or x.is_meta:  # even loads
        sent = [[_share(len(order), n * local, r * local + e) for e in range(local)]
                for r in range(n)]  # fmt: skip
        got = sent
    else:
        sent, got = torch.stack([counts, arrive]).tolist()  # the one look of the host
    send, recv = [sum(row) for row in sent], [sum(row) for row in got]
    kept = sum(send)
    source = order[:kept]
    place = _inverse(order).clamp(max=kept)
    rows = _Take.apply(x.reshape(-1, x.shape[-1]), source, place, k)
    mine = _Take.apply(gates.reshape(-1, 1), source, place, 1)
    arrivals = [comm.all_to_all_v_async(t, "experts", send, recv) for t in (rows, mine)]
    beside = meanwhile() if meanwhile else None
    rows, mine = (arrival() for arrival in arrivals)
    per_expert = [sum(column) for column in zip(*got, strict=True)]
    # Rows lie by rank, and of each rank by expert.
    number = torch.arange(n * local, device=x.device) % local
    number = torch.repeat_interleave(number, arrive.reshape(-1), output_size=sum(recv))
    sort = torch.argsort(number, stable=True)
    back = _inverse(sort)
    rows, mine = _Take.apply(rows, sort, back, 1), _Take.apply(mine, sort, back, 1)
    y = expert_rows(rows, mine, per_expert, weights, activation, products=products)
    y = _Take.apply(y, back, sort, 1)
    y = comm.all_to_all_v(y, "experts", recv, send)
    return _Put.apply(y, source, place, k).view(x.shape), beside


def _by_expert(choice: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the choices in the order of their experts, and where those of each begin and end."""
    flat = choice.reshape(-1).to(torch.int32)  # half the passes of a sort of int64
    experts, order = torch.sort(flat, stable=True)
    number = torch.arange(num_experts + 1, dtype=torch.int32, device=choice.device)
    return order, torch.searchsorted(experts, number)


def _inverse(order: Tensor) -> Tensor:
    """Return the permutation that undoes another."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _share(total: int, parts: int, at: int) -> int:
    """Return the size of part `at` of an even split."""
    return total // parts + (at < total % parts)


def _capped(
    comm: Comm,
    x: Tensor,
    gates: Tensor,
    choice: Tensor,
    weights: Sequence[Tensor],
    activation: Callable[..., Tensor],
    capacity: int,
    meanwhile: Meanwhile,
) -> tuple[Tensor, Tensor | None]:
    batch, seq, k = choice.shape
    num_experts = weights[0].shape[0] * comm.axis_size("experts")
    room = min(capacity, seq)  # a token takes an expert at most once
    number = torch.arange(num_experts, device=x.device)
    taken = (choice.unsqueeze(-1) == number).sum(2)
    before = torch.cumsum(taken, 1) - taken
    place = before.gather(-1, choice.clamp(max=num_experts - 1))
    row = torch.arange(batch, device=x.device)[:, None, None]
    slots = num_experts * batch * room
    place = torch.where(choice < num_experts, (choice * batch + row) * room + place, slots)
    place = place.reshape(-1)
    index = torch.arange(place.numel(), device=x.device)
    # All dropped choices meet in one last slot, which is cut off; empty slots read a row of zeros.
    source = torch.full_like(index.new_empty(slots + 1), place.numel())
    source = source.scatter(0, place, index)[:slots]

    def send(rows: Tensor, choices: int) -> Callable[[], Tensor]:
        rows = _Take.apply(rows, source, place, choices)
        return comm.all_to_all_async(rows.view(num_experts, batch * room, -1), "experts", 0, 1)

    arrivals = send(x.reshape(-1, x.shape[-1]), k), send(gates.reshape(-1, 1), 1)
    beside = meanwhile() if meanwhile else None
    rows, mine = (arrival() for arrival in arrivals)
    y = comm.all_to_all(expert_slots(rows, mine, weights, activation), "experts", 1, 0)
    return _Put.apply(y.reshape(slots, -1), source, place, k).view(x.shape), beside


def _take(x: Tensor, source: Tensor, k: int) -> Tensor:
    if _by_kernel(x):
        from megatree.functional.experts_kernel import take

        return take(x.contiguous(), source, k, len(x) * k)
    return _rows(x, source // k)


def _put(y: Tensor, place: Tensor, k: int) -> Tensor:
    if _by_kernel(y):
        from megatree.functional.experts_kernel import put

        return put(y.contiguous(), place, k)
    return _rows(y, place).view(-1, k, y.shape[-1]).sum(1)


def _by_kernel(x: Tensor) -> bool:
    """Whether Triton kernels move these rows; inductor fuses more into a kernel of its own."""
    return has_kernels(x) and not torch.compiler.is_compiling()


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Return rows of `x`, and zeros where it has not so many."""
    if x.is_cuda and len(x):
        return torch.where((at < len(x))[:, None], x[at.clamp(max=len(x) - 1)], 0)
    return _with_zero(x)[at]


def _with_zero(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[-1])])


class _Take(torch.autograd.Function):
    """Rows of choices from rows of tokens; both directions only read, so no order of sums varies.

    `source`: the choice in every slot, or their number for none (a zero row). `place`: the slot of
    every choice, or their number for none. Token t makes the choices k t .. k t + k - 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(source, place)
        ctx.k = k
        return _take(x, source, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        source, place = ctx.saved_tensors
        return _Put.apply(grads[0], source, place, ctx.k), None, None, None


class _Put(torch.autograd.Function):
    """Rows of tokens as sums over their choices: the adjoint of `_Take`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(source, place)
        ctx.k = k
        return _put(y, place, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        source, place = ctx.saved_tensors
        return _Take.apply(grads[0], source, place, ctx.k), None, None, None
