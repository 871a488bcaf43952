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


def experts(
    x: Float[Tensor, "batch seq_moe embed"],
    gates: Float[Tensor, "batch seq_moe k"],
    choice: Int[Tensor, "batch seq_moe k"],
    weights: Sequence[Tensor],
    *,
    capacity: int | None = None,
    activation: Callable[..., Tensor] = swiglu,
    products: Products = "auto",
) -> Float[Tensor, "batch seq_moe embed"]:
    """Return the sum over a token's choices of gate * expert(token).

    The mesh axes of `experts` must be among those that cut the tokens (`batch`, `seq_moe`): each
    rank then sends its rows to the ranks that hold their experts. Axes of `expert_ffn` must not be:
    the result is a pending sum over them.

    Args:
        x: laid out as "batch seq_moe embed".
        gates: weights of the choices, "batch seq_moe _".
        choice: experts of the tokens; the number of experts itself is no expert.
        weights: ([gate,] up, down), each "experts expert_ffn embed".
        capacity: None sorts rows by expert and sends as many as there are, at the cost of one
            look of the host at their numbers (a plan assumes even loads). A number
            says that no expert has more rows of one sequence: rows are padded to it, shapes are
            static and the host looks at nothing. Where a sequence is cut, each piece of it is
            padded to the whole capacity, or to its own length if that is less.
        activation: of (up), or of (gate, up) if there are three weights.
        products: see `expert_rows`; "loop" and "grouped" are for rows without padding.
    """
    num_weights = len(weights)

    def dropless(comm: Comm, x: Tensor, gates: Tensor, choice: Tensor, *ws: Tensor) -> Tensor:
        return _dropless(comm, x, gates, choice, ws, activation, products)

    def capped(comm: Comm, x: Tensor, gates: Tensor, choice: Tensor, *ws: Tensor) -> Tensor:
        assert capacity is not None
        return _capped(comm, x, gates, choice, ws, activation, capacity)

    body = local_map(
        dropless if capacity is None else capped,
        in_axes=(
            "batch seq_moe embed",
            "batch seq_moe _",
            "batch seq_moe _",
            *("experts expert_ffn embed",) * num_weights,
        ),
        out_axes=Out("batch seq_moe embed", partial=("expert_ffn",)),
        any_order=True,  # rows are sorted by expert, and a sum does not know where they lay
    )
    return body(x, gates, choice, *weights)


def _dropless(
    comm: Comm,
    x: Tensor,
    gates: Tensor,
    choice: Tensor,
    weights: Sequence[Tensor],
    activation: Callable[..., Tensor],
    products: Products,
) -> Tensor:
    n, local, k = comm.axis_size("experts"), weights[0].shape[0], choice.shape[-1]
    flat = choice.reshape(-1)
    by_expert, order = torch.sort(flat, stable=True)
    ends = torch.arange(n * local + 1, device=x.device)
    edges = torch.searchsorted(by_expert, ends)
    counts = edges.diff().view(n, local)
    arrive = comm.all_to_all(counts, "experts", 0, 0)
    if x.is_meta:  # a plan: even loads
        sent = [[_share(flat.numel(), n * local, r * local + e) for e in range(local)]
                for r in range(n)]  # fmt: skip
        got = sent
    else:
        sent, got = torch.stack([counts, arrive]).tolist()  # the one look of the host
    send, recv = [sum(row) for row in sent], [sum(row) for row in got]
    kept = sum(send)
    source = order[:kept]
    place = torch.argsort(order).clamp(max=kept)  # dropped choices are sorted last
    rows = _Take.apply(x.reshape(-1, x.shape[-1]), source, place, k)
    mine = _Take.apply(gates.reshape(-1, 1), source, place, 1)
    rows = comm.all_to_all_v(rows, "experts", send, recv)
    mine = comm.all_to_all_v(mine, "experts", send, recv)
    per_expert = [sum(column) for column in zip(*got, strict=True)]
    if n > 1:  # rows lie by rank, and of each rank by expert
        number = torch.arange(n * local, device=x.device) % local
        number = torch.repeat_interleave(number, arrive.reshape(-1), output_size=sum(recv))
        sort = torch.argsort(number, stable=True)
        back = torch.argsort(sort)
        rows, mine = _Take.apply(rows, sort, back, 1), _Take.apply(mine, sort, back, 1)
        y = expert_rows(rows, mine, per_expert, weights, activation, products=products)
        y = _Take.apply(y, back, sort, 1)
    else:
        y = expert_rows(rows, mine, per_expert, weights, activation, products=products)
    y = comm.all_to_all_v(y, "experts", recv, send)
    return _Put.apply(y, source, place, k).view(x.shape)


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
) -> Tensor:
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

    def sent(rows: Tensor, choices: int) -> Tensor:
        rows = _Take.apply(rows, source, place, choices)
        return comm.all_to_all(rows.view(num_experts, batch * room, -1), "experts", 0, 1)

    rows, mine = sent(x.reshape(-1, x.shape[-1]), k), sent(gates.reshape(-1, 1), 1)
    y = comm.all_to_all(expert_slots(rows, mine, weights, activation), "experts", 1, 0)
    return _Put.apply(y.reshape(slots, -1), source, place, k).view(x.shape)


def _take(x: Tensor, source: Tensor, k: int) -> Tensor:
    return _with_zero(x)[source // k]


def _put(y: Tensor, place: Tensor, k: int) -> Tensor:
    return _with_zero(y)[place].view(-1, k, y.shape[-1]).sum(1)


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
