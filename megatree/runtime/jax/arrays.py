"""Arrays to and from JAX by dlpack: no copy where one device holds the whole."""

from collections.abc import Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from megatree.functional.tree import map_with_names
from megatree.parallel.layout import Layout
from megatree.runtime.jax.form import has_64_bits
from megatree.runtime.jax.shardings import jax_mesh, sharding_of


def arrays_to_jax(
    tree: Any,
    layout: Layout | None = None,
    axes: Any = None,
    *,
    devices: Sequence[Any] | None = None,
) -> Any:
    """Return a tree of tensors as JAX arrays.

    Without a layout, or on a mesh of one rank, each array is the tensor's own memory (of a tensor
    that is not contiguous, or not aligned to 64 bytes, a copy): JAX holds arrays for constant, so
    write to the tensor no more. With a layout, whole tensors are cut over the mesh.

    Args:
        tree: tree of whole tensors.
        layout: mesh and rules.
        axes: with a layout, a tree of the same structure that says what each array is: Param,
            Array, ShardType, PartitionSpec, or axes as a string ("batch seq").
        devices: one per rank of the mesh; None takes `jax.devices()`.

    Returns:
        A tree of JAX arrays.

    Raises:
        ValueError: a 64-bit tensor, and JAX has 64 bits switched off.
        ShardingError: a declaration does not fit, or there are too few devices.
    """
    if layout is None:
        return map_with_names(to_array, tree)
    if axes is None:
        raise ValueError(
            "arrays_to_jax: a layout without axes. Give axes=, the tree of Param, Array or "
            "strings that says what each array is."
        )
    mesh = jax_mesh(layout, devices)

    def cut(name: str, x: Tensor, declared: Any) -> jax.Array:
        sharding = sharding_of(layout, mesh, declared, tuple(x.shape), name)
        return jax.device_put(to_array(name, x), sharding)

    return map_with_names(cut, tree, axes)


def arrays_from_jax(tree: Any) -> Any:
    """Return a tree of JAX arrays as whole tensors, in the arrays' own memory if one device has it.

    JAX holds arrays for constant: clone a tensor before writing to it.

    Args:
        tree: tree of JAX arrays; one cut over devices is gathered to the first.

    Returns:
        A tree of tensors.

    Raises:
        ValueError: an array lies partly on other processes' devices.
    """
    return map_with_names(from_array, tree)


def to_array(name: str, x: Tensor) -> jax.Array:
    """Return a tensor as a JAX array; see `arrays_to_jax`."""
    check_width(name, x)
    x = x.detach()
    return jax.numpy.from_dlpack(x if x.is_contiguous() else x.contiguous())


def from_array(name: str, x: jax.Array) -> Tensor:
    """Return a JAX array as a tensor; see `arrays_from_jax`."""
    if not x.is_fully_addressable:
        raise ValueError(
            f"{name}: {x.sharding} has parts on other processes' devices. "
            "Gather it first, or save it with Orbax."
        )
    if len(x.sharding.device_set) > 1:
        x = jax.device_put(x, x.addressable_shards[0].device)
    return torch.from_dlpack(jax.block_until_ready(x))


def check_width(name: str, x: Tensor) -> None:
    """Refuse a 64-bit tensor where JAX would silently make 32 bits of it."""
    if x.dtype in (torch.float64, torch.int64) and not has_64_bits():
        raise ValueError(
            f"{name}: {x.dtype} tensor, and JAX has 64 bits switched off. "
            "Set jax.config.update('jax_enable_x64', True), or cast it."
        )
