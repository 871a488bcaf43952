"""Every type that a value can have on a mesh, and moves of whole values between types."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatree.parallel.assemble import assemble
from megatree.parallel.comm import move
from megatree.parallel.rulecheck import spread
from megatree.parallel.threads import ThreadComm, Threads
from megatree.parallel.types import I, P, R, ShardType, make_type
from tests.tolerances import RELATIVE, distance

EXACT = RELATIVE[torch.float64]


def all_types(sizes: Mapping[str, int], shape: tuple[int, ...]) -> list[ShardType]:
    """Return every type of an array over a mesh: all states, all orders of axes on a dim."""
    found: dict[ShardType, None] = {}
    for choice in itertools.product([*range(len(shape)), I, P, R], repeat=len(sizes)):
        states = dict(zip(sizes, choice, strict=True))
        for order in itertools.permutations(sizes):
            found[type_of(states, order, sizes, shape)] = None
    return list(found)


def type_of(
    states: Mapping[str, str | int],
    order: Sequence[str],
    sizes: Mapping[str, int],
    shape: tuple[int, ...],
) -> ShardType:
    """Return the type with a state (a dim, or I, R, P) per mesh axis, axes on one dim in `order`."""
    spec = tuple(tuple(a for a in order if states[a] == dim) for dim in range(len(shape)))
    kinds = {axis: state for axis, state in states.items() if isinstance(state, str)}
    return make_type(shape, torch.float64, spec, sizes, kinds=kinds, grad=True)


def moves_go_wrong(
    pairs: Sequence[tuple[ShardType, ShardType]], sizes: Mapping[str, int], seed: int = 0
) -> list[str]:
    """Move random values and cotangents on simulated ranks; say which change, and by how much.

    A move is the identity on the global value, and so is its dual on the global cotangent.
    """
    generator = torch.Generator().manual_seed(seed)
    work = []
    for src, dst in pairs:
        pair = torch.randn(2, *src.shape, dtype=torch.float64, generator=generator)
        xs = spread(pair[0], src, sizes, generator)
        work.append((src, dst, pair, xs, spread(pair[1], dst.dual, sizes, generator)))

    def rank_main(comm: ThreadComm) -> list[tuple[Tensor, Tensor]]:
        out = []
        for src, dst, _, xs, gs in work:
            x = xs[comm.rank].clone().requires_grad_()
            y = move(comm, x, src, dst)
            y.backward(gs[comm.rank])
            assert x.grad is not None
            out.append((y.detach(), x.grad))
        return out

    results = Threads(sizes).run(rank_main)
    wrong = []
    for at, (src, dst, (value, cotangent), _, _) in enumerate(work):
        for what, ty, part, expected in (
            ("value", dst, 0, value),
            ("cotangent", src.dual, 1, cotangent),
        ):
            place = f"{what} of {src} -> {dst}"
            got = assemble([r[at][part] for r in results], ty, sizes, place, rtol=EXACT)
            if (error := distance(got, expected)) > EXACT:
                wrong.append(f"{place}: off by {error:.3g}")
    return wrong
