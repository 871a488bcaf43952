"""`from_jax`: a JAX function inside a torch function, with gradients both ways."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from megatree.runtime.jax.arrays import check_width, from_array, to_array
from megatree.runtime.jax.form import dtype_of


def from_jax(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a JAX function as a function of tensors, compiled by JAX, with JAX's gradients.

    Tensors become arrays and results tensors by dlpack, without copies. Gradients of any order
    flow to every floating tensor among the arguments. In a lowered function, declare what calls it
    as an op: `op("b t d!, f d! -> b t f")(from_jax(f))`. `to_jax` runs `f` itself.

    Args:
        f: a pure function of trees of arrays (a Flax `apply`, an Equinox module's call on its
            arrays), given by position. Leaves that are no tensors (numbers, strings) are static.

    Returns:
        A function of the same trees of tensors.

    Raises:
        ValueError: (when called) a 64-bit tensor, and JAX has 64 bits switched off.

    Reference: DESIGN section 3.

    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> from_jax(jnp.square)(x).backward()
    >>> x.grad
    tensor([6.])
    """

    @functools.cache
    def compiled(tree: Any, static: tuple[Any, ...]) -> "_Flat":
        """Return `f` for one structure of its arguments."""

        def of_arrays(*arrays: Array) -> Any:
            given = iter(arrays)
            leaves = [next(given) if x is _TENSOR else x for x in static]
            return f(*jax.tree.unflatten(tree, leaves))

        return _Flat(call.__name__, of_arrays)

    @functools.wraps(f, updated=())
    def call(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        tensors = tuple(x for x in leaves if isinstance(x, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, *args)
        static = tuple(_TENSOR if isinstance(x, Tensor) else x for x in leaves)
        return compiled(tree, static)(*tensors)

    call.__name__ = getattr(f, "__name__", type(f).__name__)
    call.jax_function = f  # type: ignore[attr-defined]
    return call


_TENSOR = object()
"""The place of a tensor among the static leaves."""


class _Flat:
    """A JAX function of arrays as one of tensors; each way is compiled once per shapes."""

    def __init__(self, name: str, f: Callable[..., Any]) -> None:
        self.name, self.f = name, f
        self.run = jax.jit(f)
        self.linearise = jax.jit(self._linearise)
        self.transpose = jax.jit(lambda pull, cotangents: pull(cotangents))

    def __call__(self, *tensors: Tensor) -> Any:
        for i, x in enumerate(tensors):
            check_width(f"{self.name}: tensor {i}", x)
        shapes = jax.eval_shape(self.run, *map(_abstract, tensors))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            outs = _Call.apply(self, shapes, *tensors)
        elif any(x.is_meta for x in tensors):
            outs = map(_meta, jax.tree.leaves(shapes))
        else:
            outs = _to_tensors(self.name, jax.tree.leaves(self.run(*_to_arrays(tensors))), tensors)
        return jax.tree.unflatten(jax.tree.structure(shapes), list(outs))

    def _linearise(self, *xs: Array) -> Any:
        """Return the floating results, the pullback of their cotangents and the other results."""
        floating = [x for x in xs if _flows(x)]

        def of_floating(*some: Array) -> Any:
            given = iter(some)
            outs = jax.tree.leaves(self.f(*(next(given) if _flows(x) else x for x in xs)))
            return [y for y in outs if _flows(y)], [y for y in outs if not _flows(y)]

        return jax.vjp(of_floating, *floating, has_aux=True)

    @functools.cache  # noqa: B019 (as long-lived as the function it belongs to)
    def gradient(self, num_arrays: int) -> "_Flat":
        """Return the function (arrays, cotangents) -> gradients, differentiable in its turn."""

        def gradient(*both: Array) -> Any:
            _, pull, _ = self._linearise(*both[:num_arrays])
            return pull(list(both[num_arrays:]))

        return _Flat(f"gradient of {self.name}", gradient)


class _Call(torch.autograd.Function):
    """One call whose backward is JAX's pullback, or a differentiable function where asked for."""

    @staticmethod
    def forward(ctx: Any, flat: _Flat, shapes: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flat = flat
        ctx.save_for_backward(*tensors)  # also so that torch sees a later in-place write
        leaves = jax.tree.leaves(shapes)
        ctx.flows = [_flows(y) for y in leaves]
        if any(x.is_meta for x in tensors):
            outs = tuple(map(_meta, leaves))
            ctx.pull = None
        else:
            some, ctx.pull, others = flat.linearise(*_to_arrays(tensors))
            parts = {True: iter(some), False: iter(others)}
            outs = _to_tensors(flat.name, [next(parts[flow]) for flow in ctx.flows], tensors)
        ctx.mark_non_differentiable(
            *(y for y, flow in zip(outs, ctx.flows, strict=True) if not flow)
        )
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors
        cotangents = [g for g, flow in zip(grads, ctx.flows, strict=True) if flow]
        floating = [x for x in tensors if x.is_floating_point()]
        if ctx.pull is None:
            found: Sequence[Tensor] = [torch.empty_like(x) for x in floating]
        elif torch.is_grad_enabled():
            found = ctx.flat.gradient(len(tensors))(*tensors, *cotangents)
        else:
            arrays = _to_arrays(cotangents)
            found = _to_tensors(ctx.flat.name, ctx.flat.transpose(ctx.pull, arrays), cotangents)
        given = iter(found)
        return None, None, *(next(given) if x.is_floating_point() else None for x in tensors)


def _flows(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _abstract(x: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(x.shape), dtype_of(x.dtype))


def _meta(x: jax.ShapeDtypeStruct) -> Tensor:
    return torch.empty(x.shape, dtype=getattr(torch, str(x.dtype)), device="meta")


def _to_arrays(tensors: Sequence[Tensor]) -> list[Array]:
    return [to_array(f"tensor {i}", x) for i, x in enumerate(tensors)]


def _to_tensors(name: str, arrays: Sequence[Array], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return results as tensors; one that is an input's memory is copied, as torch expects."""
    taken = {x.data_ptr() for x in inputs if x.numel()}
    outs = [from_array(name, x) for x in arrays]
    return tuple(y.clone() if y.data_ptr() in taken else y for y in outs)
