"""Whole values on simulated ranks: all types, moves between them, functions against one device."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from megatree.parallel.assemble import assemble
from megatree.parallel.comm import move
from megatree.parallel.layout import Layout
from megatree.parallel.rulecheck import spread
from megatree.parallel.simulate import Simulated, simulate
from megatree.parallel.threads import ThreadComm, Threads
from megatree.parallel.types import I, P, R, ShardType, make_type
from tests.tolerances import RELATIVE, assert_leaves_close, distance

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
    """Return the type with a state (a dim, or I, R, P) per mesh axis, those of a dim in `order`."""
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


def assert_like_one_device(
    fn: Callable[..., Any], layout: Layout, values: Sequence[Any], axes: tuple[Any, ...]
) -> Simulated:
    """Run a function on simulated ranks and on plain tensors; compare values and all gradients.

    Args:
        fn: a function of trees of tensors.
        layout: mesh and rules.
        values: whole tensors, one tree per argument.
        axes: per argument a tree of declarations (see `simulate`).

    Returns:
        What the simulated ranks computed.
    """
    generator = torch.Generator().manual_seed(7)
    plain = [optree.tree_map(lambda x: x.clone().requires_grad_(x.is_floating_point()), v)
             for v in values]  # fmt: skip
    out = fn(*plain)
    cotangents = optree.tree_map(
        lambda y: (
            torch.randn(y.shape, dtype=y.dtype, generator=generator) if y.is_floating_point() else y
        ),
        out,
    )
    flowing = [
        (y, g)
        for y, g in zip(optree.tree_leaves(out), optree.tree_leaves(cotangents), strict=True)
        if y.requires_grad
    ]
    torch.autograd.backward([y for y, _ in flowing], [g for _, g in flowing])
    ran = simulate(fn, layout, *values, axes=axes, cotangents=cotangents, rtol=EXACT)
    got, expected = dict(_named("result", ran.value)), dict(_named("result", out))
    for at, (mine, whole) in enumerate(zip(ran.grads, plain, strict=True)):
        for (name, x), (_, y) in zip(
            _named(f"gradient {at}", mine), _named(f"gradient {at}", whole), strict=True
        ):
            if x is not None:
                got[name] = x
                expected[name] = torch.zeros_like(y) if y.grad is None else y.grad
    assert_leaves_close(got, expected)
    return ran


def _named(lead: str, tree: Any) -> Iterator[tuple[str, Any]]:
    paths, leaves, _ = optree.tree_flatten_with_path(tree, none_is_leaf=True)
    for path, leaf in zip(paths, leaves, strict=True):
        yield f"{lead} {path}", leaf
