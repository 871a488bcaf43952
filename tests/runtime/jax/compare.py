"""Run functions in torch and in JAX, and compare values, dtypes and gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optree
import torch
from torch import Tensor

from megatree.runtime.jax.to_jax import to_jax


def array(x: Tensor) -> jax.Array:
    """Return a copy of a tensor as an array."""
    x = x.detach()
    wide = x.double() if x.dtype == torch.bfloat16 else x  # numpy has none
    return jnp.asarray(wide.numpy(), dtype=str(x.dtype).removeprefix("torch."))


def tensor(x: jax.Array) -> Tensor:
    """Return a copy of an array as a float64 or integer tensor."""
    wide = np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None
    return torch.tensor(np.asarray(x, dtype=wide))


def off(got: Tensor, expected: Tensor) -> float:
    """Return the relative L2 distance of two tensors of one shape."""
    expected = expected.detach().double()
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@dataclass(frozen=True)
class InTorch:
    """A call in torch: what JAX must give.

    Args:
        fn: a function of tensors with a tree of results.
        xs: its operands.
        outs: the flat results.
        seeds: cotangents of the results that flow.
        grads: of the operands that take one.
    """

    fn: Callable[..., Any]
    xs: Sequence[Tensor]
    outs: Sequence[Tensor]
    seeds: Sequence[Tensor]
    grads: Sequence[Tensor]


def in_torch(fn: Callable[..., Any], operands: Sequence[Tensor], *, grad: bool = True) -> InTorch:
    """Run a function in torch, forward and backward from random cotangents."""
    xs = [x.detach().clone().requires_grad_(grad and x.is_floating_point()) for x in operands]
    outs = optree.tree_leaves(fn(*xs))
    draw = torch.Generator().manual_seed(0)
    roots = [y for y in outs if y.requires_grad]
    seeds = [torch.randn(y.shape, dtype=torch.float64, generator=draw).to(y.dtype) for y in roots]
    leaves = [x for x in xs if x.requires_grad]
    grads = torch.autograd.grad(roots, leaves, seeds, allow_unused=True) if roots else ()
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=False)]
    return InTorch(fn, xs, outs, seeds, full)


def differences(
    calls: Sequence[InTorch], names: Sequence[str] | None = None, **options: Any
) -> list[dict[str, float]]:
    """Return, per call, how far JAX is from torch (relative L2) in every result and gradient.

    Args:
        calls: compiled by JAX into one program.
        names: of the calls, for errors.
        options: of `to_jax`.

    Raises:
        AssertionError: a shape or dtype differs.
    """
    names = names or [str(i) for i in range(len(calls))]

    def everything(arguments: Any) -> Any:
        out = []
        for name, call, (arrays, seeds) in zip(names, calls, arguments, strict=True):
            try:
                out.append(_run(to_jax(call.fn, **options), call, arrays, seeds))
            except Exception as error:
                error.add_note(f"in a call of {name}")
                raise
        return out

    arguments = [(list(map(array, c.xs)), list(map(array, c.seeds))) for c in calls]
    results = jax.jit(everything)(arguments)
    all_found = []
    for name, call, (outs, grads) in zip(names, calls, results, strict=True):
        found = {}
        for i, (y, z) in enumerate(zip(call.outs, outs, strict=True)):
            assert (str(y.dtype), tuple(y.shape)) == (f"torch.{z.dtype}", z.shape), (name, i)
            found[f"result {i}"] = off(tensor(z), y)
        for i, (g, z) in enumerate(zip(call.grads, grads, strict=True)):
            found[f"gradient {i}"] = off(tensor(z), g)
        all_found.append(found)
    return all_found


def _run(
    fn: Callable[..., Any], call: InTorch, arrays: list[jax.Array], seeds: list[jax.Array]
) -> tuple[list[jax.Array], Sequence[jax.Array]]:
    """Run a JAX function and, where a result flows, its pullback."""
    where = [i for i, x in enumerate(call.xs) if x.requires_grad]

    def of(*some: jax.Array) -> Any:
        full = list(arrays)
        for i, x in zip(where, some, strict=True):
            full[i] = x
        outs = jax.tree.leaves(fn(*full))
        flows = [y.requires_grad for y in call.outs]
        return [y for y, flow in zip(outs, flows, strict=True) if flow], outs

    if not seeds:
        return jax.tree.leaves(fn(*arrays)), ()
    _, pull, outs = jax.vjp(of, *(arrays[i] for i in where), has_aux=True)
    return outs, pull(seeds)
