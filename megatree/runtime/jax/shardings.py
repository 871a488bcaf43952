"""Meshes, rules and types as JAX spells them: Mesh, PartitionSpec and NamedSharding, both ways."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as JaxMesh

from megatree.functional.param import Array, Param, axis_names
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules, check_spec
from megatree.parallel.types import P, R, ShardType, make_type
from megatree.runtime.jax.form import dtype_of

Declared = Param | Array | ShardType | PartitionSpec | str
"""What says how an array is cut: a declaration, a type, JAX's own spec, or axes ("batch seq")."""


def jax_mesh(layout: Layout, devices: Sequence[Any] | None = None) -> JaxMesh:
    """Return the layout's mesh over JAX devices: rank r is device r, axes larger than 1 have names.

    Args:
        layout: its mesh, without a pipeline axis (JAX cuts no programs into stages).
        devices: at least one per rank; None takes `jax.devices()`.

    Raises:
        ShardingError: there are fewer devices than ranks.
    """
    sizes = layout.sizes
    ranks = math.prod(sizes.values())
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < ranks:
        raise ShardingError(
            f"to_jax: the mesh {layout.mesh} has {ranks} ranks, JAX has {len(devices)} devices. "
            f"Give more, or on a CPU call jax.config.update('jax_num_cpu_devices', {ranks}) first."
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:ranks],
    )


def explicit_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Return a mesh without devices on which JAX types every value (explicit mode)."""
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes)
    )


def partition_spec(spec: Sequence[Sequence[str]], **states: Any) -> PartitionSpec:
    """Return JAX's spelling of the mesh axes that cut each dim."""
    dims = (tuple(axes) if len(axes) > 1 else axes[0] if axes else None for axes in spec)
    return PartitionSpec(*dims, **states)


def spec_of_axes(layout: Layout, axes: str, shape: tuple[int, ...], place: str) -> PartitionSpec:
    """Return what the rules make of a value's logical axes.

    Raises:
        ShardingError: a mesh axis cuts two dims, or a dim does not divide.
    """
    return partition_spec(layout.spec(axis_names(axes, place), shape, place))


def to_partition_spec(ty: ShardType) -> PartitionSpec:
    """Return a type as JAX's explicit mode writes it: P is `unreduced`, R is `reduced`."""
    return partition_spec(
        ty.spec, unreduced=frozenset(ty.axes_in(P)), reduced=frozenset(ty.axes_in(R))
    )


def from_partition_spec(
    spec: PartitionSpec,
    shape: tuple[int, ...],
    dtype: Any,
    sizes: Mapping[str, int],
    *,
    grad: bool = False,
) -> ShardType:
    """Return the type that JAX's spec spells, the inverse of `to_partition_spec`.

    Raises:
        ShardingError: a mesh axis cuts two dims, or a dim does not divide.
    """
    dims = [_axes(entry) for entry in spec.partitions]
    dims += [()] * (len(shape) - len(dims))
    cut = tuple(tuple(axis for axis in axes if axis in sizes) for axes in dims)
    names = tuple(str(d) for d in range(len(shape)))
    check_spec(cut, names, shape, sizes, str(spec))
    kinds = {**dict.fromkeys(spec.unreduced, P), **dict.fromkeys(spec.reduced, R)}
    return make_type(shape, dtype, cut, sizes, kinds=kinds, grad=grad)


def rules_to_specs(rules: Rules, axes: Mapping[str, str]) -> dict[str, PartitionSpec]:
    """Return the PartitionSpec that the rules give each of several arrays, by its logical axes.

    >>> rules_to_specs(Rules(embed="dp", ffn="tp"), {"w_up": "ffn embed"})
    {'w_up': P('tp', 'dp')}
    """
    table = dict(rules.table)
    return {
        name: partition_spec([table.get(axis, ()) for axis in text.split()])
        for name, text in axes.items()
    }


def rules_from_specs(specs: Mapping[str, PartitionSpec], axes: Mapping[str, str]) -> Rules:
    """Return the rules under which arrays of these logical axes have these PartitionSpecs.

    Raises:
        ShardingError: two arrays cut the same axis differently; one rule cannot say both.

    >>> print(rules_from_specs({"w_up": PartitionSpec("tp", None)}, {"w_up": "ffn embed"}))
    embed -> whole, ffn -> tp
    """
    rules: dict[str, tuple[str, ...]] = {}
    where: dict[str, str] = {}
    for name, spec in specs.items():
        names = axis_names(axes[name], name)
        entries = [*map(_axes, spec.partitions), *[()] * (len(names) - len(spec.partitions))]
        for axis, cut in zip(names, entries, strict=True):
            if rules.setdefault(axis, cut) != cut:
                raise ShardingError(
                    f"{name}: {spec} cuts {axis!r} over {cut or 'nothing'}, and {where[axis]} cuts "
                    f"it over {rules[axis] or 'nothing'}. Give the axis two names."
                )
            where.setdefault(axis, name)
    return Rules(**rules)


def sharding_of(
    layout: Layout, mesh: JaxMesh, declared: Declared, shape: tuple[int, ...], place: str
) -> NamedSharding:
    """Return how a declared array of a shape lies on a JAX mesh.

    Raises:
        ShardingError: the declaration does not fit the shape or the layout.
    """
    if isinstance(declared, PartitionSpec):
        return NamedSharding(mesh, declared)
    if isinstance(declared, ShardType):
        return NamedSharding(mesh, partition_spec(declared.spec))
    axes = declared if isinstance(declared, str) else declared.axes
    if len(axes.split()) != len(shape):
        raise ShardingError(
            f"{place}: declared {axes!r}, which names {len(axes.split())} axes; the array has "
            f"{len(shape)} dims {shape}. Give one name per dim."
        )
    return NamedSharding(mesh, spec_of_axes(layout, axes, shape, place))


def abstract_array(ty: ShardType, mesh: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """Return a value without data, laid out on a mesh."""
    return jax.ShapeDtypeStruct(ty.shape, dtype_of(ty.dtype), sharding=NamedSharding(mesh, spec))


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
