"""`rulecheck`: try every placement of an op's operands; what the rule allows must be exact."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatree.functional.tree import leaves_of
from megatree.parallel.assemble import points
from megatree.parallel.engine import Refusal
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, cut
from megatree.parallel.lower import Traced, trace
from megatree.parallel.mesh import Mesh
from megatree.parallel.simulate import Simulated, run_simulated
from megatree.parallel.threads import SimulationError
from megatree.parallel.types import I, P, R, ShardType, make_type


@dataclass(frozen=True)
class RuleCheck:
    """What `rulecheck` tried.

    Args:
        legal: placements that the rule allows, each found exact.
        refused: placements that the rule refuses.
    """

    legal: tuple[tuple[ShardType, ...], ...]
    refused: tuple[tuple[ShardType, ...], ...]


def rulecheck(
    fn: Callable[..., Any],
    *operands: Tensor,
    mesh: Mapping[str, int] | None = None,
    grad: bool = True,
    rtol: float = 1e-10,
    seed: int = 0,
) -> RuleCheck:
    """Check an op's sharding rule numerically: values and all gradients against one device.

    Every operand takes every state on every mesh axis (cut on each dim that divides, invariant,
    replicated, a random pending sum). A placement that is refused is fine; one that is allowed must
    give the same values and gradients as whole tensors do.

    Args:
        fn: the op, a function of the operands (bind static options with a lambda).
        operands: whole tensors; floating ones should be float64.
        mesh: mesh axis -> size; None: one axis of 2.
        grad: whether floating operands take gradients.
        rtol: allowed relative L2 error.
        seed: of cotangents and pending terms.

    Returns:
        The placements tried.

    Raises:
        SimulationError: an allowed placement gives other values or gradients than one device; the
            message names the placement.
    """
    sizes = dict(mesh or {"a": 2})
    generator = torch.Generator().manual_seed(seed)
    reference = [
        x.detach().clone().requires_grad_(grad and x.is_floating_point()) for x in operands
    ]
    out = leaves_of(tuple_of(fn(*reference)))
    cotangents = [
        torch.randn(y.shape, dtype=y.dtype, generator=generator) if y.is_floating_point() else None
        for y in out
    ]
    flowing = [(y, g) for y, g in zip(out, cotangents, strict=True) if y.requires_grad]
    if flowing:
        torch.autograd.backward([y for y, _ in flowing], [g for _, g in flowing])
    tried = try_placements(fn, operands, sizes, grad)
    for placement, traced in tried.items():
        if traced is None:
            continue
        pairs = zip(operands, placement, strict=True)
        values = [spread(x, ty, sizes, generator) for x, ty in pairs]
        try:
            got = run_simulated(traced.finish(), values, cotangents, rtol=rtol)
        except Exception as error:
            raise SimulationError(f"{_blame(placement)} this happens: {error}") from error
        _compare(placement, got, out, [x.grad for x in reference], rtol)
    legal = tuple(placement for placement, traced in tried.items() if traced)
    if not legal:
        raise SimulationError(f"rulecheck: the rule allows none of {len(tried)} placements.")
    return RuleCheck(legal, tuple(p for p, traced in tried.items() if not traced))


def try_placements(
    fn: Callable[..., Any], operands: Sequence[Tensor], sizes: Mapping[str, int], grad: bool
) -> dict[tuple[ShardType, ...], Traced | None]:
    """Return every placement of the operands with the typed op, None where the rule refuses it."""
    layout = Layout(Mesh(**sizes))
    tried: dict[tuple[ShardType, ...], Traced | None] = {}
    for placement in itertools.product(*(placements(x, sizes, grad) for x in operands)):
        try:
            tried[placement] = trace(lambda *xs: tuple_of(fn(*xs)), layout, *placement)
        except (ShardingError, Refusal):
            tried[placement] = None
    return tried


def tuple_of(out: Any) -> tuple[Any, ...]:
    """Return a result as a tuple."""
    return (out,) if isinstance(out, Tensor) else tuple(out)


def placements(x: Tensor, sizes: Mapping[str, int], grad: bool) -> list[ShardType]:
    """Return every type of a value on a mesh, axes on one dim in mesh order."""
    grad = grad and x.is_floating_point()
    states = [*range(x.dim()), I, *([P] if x.is_floating_point() else []), *([R] if grad else [])]
    out = []
    for choice in itertools.product(states, repeat=len(sizes)):
        spec: list[tuple[str, ...]] = [() for _ in range(x.dim())]
        for axis, state in zip(sizes, choice, strict=True):
            if isinstance(state, int):
                spec[state] = (*spec[state], axis)
        kinds = {a: s for a, s in zip(sizes, choice, strict=True) if isinstance(s, str)}
        ty = make_type(tuple(x.shape), x.dtype, tuple(spec), sizes, kinds=kinds, grad=grad)
        cuts = zip(ty.shape, ty.local_shape(sizes), spec, strict=True)
        if all(n == k * math.prod(sizes[a] for a in axes) for n, k, axes in cuts):
            out.append(ty)
    return out


def spread(
    x: Tensor, ty: ShardType, sizes: Mapping[str, int], generator: torch.Generator
) -> list[Tensor]:
    """Return every rank's local tensor: slices, copies, random terms of pending sums."""
    pending = ty.axes_in(P)
    first, *others = itertools.product(*(range(sizes[axis]) for axis in pending))
    # One term per coordinate on the pending axes: ranks that differ on I or R axes hold the same.
    terms = {at: torch.randn(x.shape, dtype=x.dtype, generator=generator) for at in others}
    terms[first] = x - sum(terms.values()) if terms else x
    return [
        cut(terms[tuple(at[axis] for axis in pending)], ty.spec, sizes, at).clone()
        for at in points(sizes)
    ]


def _compare(
    placement: tuple[ShardType, ...],
    got: Simulated,
    out: list[Tensor],
    grads: list[Tensor | None],
    rtol: float,
) -> None:
    values = leaves_of(got.value)
    named = [(f"result {i}", a, b) for i, (a, b) in enumerate(zip(values, out, strict=True))]
    for i, grad in enumerate(grads):
        mine = got.grads[i]
        if mine is not None:
            named.append((f"gradient of operand {i}", mine, mine * 0 if grad is None else grad))
    for name, a, b in named:
        expected = b.detach().double()
        error = (a.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        if not error <= rtol:
            raise SimulationError(
                f"{_blame(placement)} the {name} is off by {error:.3g} (relative L2). "
                "Mark a dim that the function looks along with ! in the signature, one that it "
                "sums with +."
            )


def _blame(placement: tuple[ShardType, ...]) -> str:
    where = ", ".join(map(str, placement))
    return f"rulecheck: the rule or the op's local form is wrong: with operands ({where})"
