"""The collectives that XLA's partitioner chose for a program, beside ours."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optree
from jax import Array

from megatree.functional.tree import flatten_with_paths
from megatree.parallel.layout import Layout
from megatree.parallel.model import ModelProgram
from megatree.parallel.program import Collective
from megatree.parallel.types import ShardType
from megatree.runtime.jax.shardings import abstract_array, jax_mesh, partition_spec
from megatree.runtime.jax.to_jax import to_jax
from megatree.runtime.jax.units import unit_function, unit_types

KINDS = {
    "all-reduce": "psum",
    "all-gather": "all_gather",
    "reduce-scatter": "psum_scatter",
    "all-to-all": "all_to_all",
    "collective-permute": "ppermute",
}
"""XLA's name of a collective -> ours."""

_CALL = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_LINE = re.compile(r"(?:[\w.-]+/)?[\w.-]+\.py:\d+")
# One message per value, as ours are counted, and a compilation that is only read.
_OPTIONS = {
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
    "xla_backend_optimization_level": 0,
}


def against_jax(program: ModelProgram, unit: str | None = None) -> str:
    """Print, per unit and phase, our collectives and those that XLA's partitioner chose.

    Both run the same function with inputs and results laid out alike, forward and backward. XLA
    reduces a leaf's gradient in the backward, where ours waits for the end of the step (sync), and
    makes whole sums of results that are pending here. On a CPU it writes a reduce-scatter as an
    all-reduce and a slice.

    Args:
        program: a lowered model.
        unit: the unit to print ("blocks.dense"); None for all.

    Raises:
        ShardingError: JAX has fewer CPU devices than the mesh has ranks.
    """
    rows = []
    for name in program.units if unit is None else [unit]:
        rows.append(f"{name} on {program.layout.mesh}: megatree | XLA")
        ours = program.units[name].program.collectives
        theirs = gspmd_collectives(program, name)
        for phase, both in (("forward", ["forward"]), ("backward", ["backward", "sync"])):
            mine = [c for c in ours if c.phase in both]
            jaxs = [c for c in theirs if c.phase == phase]
            rows.append(f"  {phase:<9} {_counts(mine)}{_size(mine)} | {_counts(jaxs)}{_size(jaxs)}")
        lines = sorted({c.source for c in [*ours, *theirs] if c.phase != "sync"})
        for source in lines:
            mine = [c for c in ours if c.source == source]
            jaxs = [c for c in theirs if c.source == source]
            rows.append(f"    {source:<22} {_counts(mine)} | {_counts(jaxs)}")
    return "\n".join(rows)


def gspmd_collectives(program: ModelProgram, unit: str) -> list[Collective]:
    """Return the collectives that XLA chose for a unit, forward and backward.

    Needs as many CPU devices as the mesh has ranks; asks JAX for them if it has not started.
    """
    lowered = program.units[unit].program
    args = unit_types(program, unit)
    return collectives_of(unit_function(program, unit), program.layout, args, lowered.out_types)


def collectives_of(
    fn: Callable[..., Any], layout: Layout, args: Sequence[Any], out_types: Sequence[ShardType]
) -> list[Collective]:
    """Compile a function and its pullback for a layout in JAX; return the collectives.

    Args:
        fn: a global-view function.
        layout: mesh and rules.
        args: per argument, a tree of types.
        out_types: types of the flat results.
    """
    with jax.enable_x64(True):
        text = compiled_text(fn, layout, args, out_types)
    return parse(text, layout.sizes)


def counts(collectives: Sequence[Collective]) -> dict[str, int]:
    """Return kind -> number of collectives."""
    return dict(Counter(c.kind for c in collectives))


def compiled_text(
    fn: Callable[..., Any], layout: Layout, args: Sequence[Any], out_types: Sequence[ShardType]
) -> str:
    """Return XLA's program of a function and its pullback, partitioned over CPU devices."""
    ask_for_devices(math.prod(layout.sizes.values()))
    devices = jax.devices("cpu")
    mesh = jax_mesh(layout, devices)
    _, types, tree = flatten_with_paths(tuple(args))
    run = to_jax(fn, layout, devices=devices)
    flows = [i for i, ty in enumerate(types) if ty.grad]

    def both(arrays: list[Array], cotangents: list[Array]) -> Any:
        def of(*some: Array) -> Any:
            full = list(arrays)
            for i, x in zip(flows, some, strict=True):
                full[i] = x
            outs = optree.tree_leaves(run(*optree.tree_unflatten(tree, full)))
            pairs = list(zip(outs, out_types, strict=True))
            return [y for y, ty in pairs if ty.grad], [y for y, ty in pairs if not ty.grad]

        outs, pull, others = jax.vjp(of, *(arrays[i] for i in flows), has_aux=True)
        return outs, others, list(pull(cotangents))

    def laid(ty: ShardType) -> Any:
        return abstract_array(ty, mesh, partition_spec(ty.spec))

    values = [laid(ty) for ty in types]
    roots = [laid(ty) for ty in out_types if ty.grad]
    rest = [laid(ty) for ty in out_types if not ty.grad]
    results = (roots, rest, [values[i] for i in flows])
    shardings = jax.tree.map(lambda x: x.sharding, results)
    jitted = jax.jit(both, out_shardings=shardings, compiler_options=_OPTIONS)
    return jitted.lower(values, roots).compile().as_text() or ""


def ask_for_devices(num: int) -> None:
    """Let JAX make at least `num` CPU devices, if it has made none yet."""
    if jax.config.values["jax_num_cpu_devices"] >= num:
        return
    try:
        jax.config.update("jax_num_cpu_devices", num)
    except RuntimeError:
        return  # it has started; whoever needs more will say so


def parse(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a compiled program of XLA.

    Args:
        text: of `Compiled.as_text()`.
        sizes: mesh axis -> size, in the order of the devices.
    """
    found = []
    for line in text.splitlines():
        if (call := _CALL.search(line)) is None:
            continue
        result, kind, _, rest = call.groups()
        name = re.search(r'op_name="([^"]*)"', rest)
        scope = name.group(1) if name else ""
        lines = _LINE.findall(scope)
        groups = _groups(rest)
        size = sum(map(_bytes, _SHAPE.finditer(result)))
        if kind == "reduce-scatter":
            size *= len(groups[0])
        found.append(
            Collective(
                source=lines[-1] if lines else "?",
                kind="pmax" if _takes_maximum(rest, text) else KINDS[kind],
                axes=_axes_of(groups, sizes),
                bytes=size,
                phase="backward" if "transpose(" in scope else "forward",
            )
        )
    return found


def _takes_maximum(rest: str, text: str) -> bool:
    """Whether the function that an all-reduce applies is a maximum."""
    applied = re.search(r"to_apply=(%[\w.-]+)", rest)
    if applied is None:
        return False
    body = re.search(rf"^{re.escape(applied.group(1))} .*?^}}", text, re.MULTILINE | re.DOTALL)
    return body is not None and " maximum(" in body.group()


def _counts(collectives: Sequence[Collective]) -> str:
    counted = Counter(f"{c.kind}({'.'.join(c.axes)})" for c in collectives)
    return " + ".join(f"{n} {name}" for name, n in sorted(counted.items())) or "-"


def _size(collectives: Sequence[Collective]) -> str:
    """Return the bytes that one rank holds of all of them, larger sides."""
    size = sum(c.bytes for c in collectives)
    return f" [{size / 1024:,.0f} KiB]" if size else ""


def _bytes(shape: re.Match[str]) -> int:
    dims = [int(n) for n in shape.group(3).split(",") if n]
    bits = 8 if shape.group(1) == "pred" else int(shape.group(2))
    return math.prod(dims) * bits // 8


def _groups(rest: str) -> list[list[int]]:
    """Return the groups of devices that one collective joins, in any of XLA's spellings."""
    if found := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", rest
    ):
        return _mesh_groups(*found.groups())
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _devices(found.group(2)).reshape(_numbers(found.group(1))).tolist()
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest)
    assert found is not None, f"a collective without groups: {rest[:200]}"
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", found.group(1))]


def _mesh_groups(mesh: str, devices: str | None, over: str) -> list[list[int]]:
    """Read `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a', 'b':(2)2}`."""
    names = re.findall(r"'(\w+)'=(\d+)", mesh)
    taken = dict(re.findall(r"'(\w+)'(?::\((\d+)\)(?=\d))?", over))
    widths = dict(re.findall(r"'(\w+)':\(\d+\)(\d+)", over))
    shape: list[int] = []
    joined: list[int] = []
    for name, size in names:
        # An axis of which a part is taken is three: what is outside, the part, what is inside.
        before = int(taken.get(name) or 1) if name in taken else int(size)
        part = int(widths.get(name) or int(size) // before)
        shape += [before, part, int(size) // (before * part)]
        joined += [len(shape) - 2] if name in taken else []
    order = [d for d in range(len(shape)) if d not in joined] + joined
    width = math.prod(shape[d] for d in joined)
    total = f"[{math.prod(shape)}]"
    return _devices(devices or total).reshape(shape).transpose(order).reshape(-1, width).tolist()


def _devices(text: str) -> np.ndarray:
    """Read a list of devices, `[2,4]T(1,0)`: row-major numbers, transposed."""
    shape, _, order = text.removesuffix(")").partition("T(")
    sizes = _numbers(shape.strip("[]"))
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes_of(groups: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the fewest mesh axes that join the devices of every group."""
    grid = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
    places = {int(grid[at]): at for at in np.ndindex(grid.shape)}
    for width in range(len(sizes) + 1):
        for axes in itertools.combinations(range(len(sizes)), width):
            rest = [d for d in range(len(sizes)) if d not in axes]
            if all(
                len({tuple(places[device][d] for d in rest) for device in group}) == 1
                for group in groups
            ):
                names = list(sizes)
                return tuple(names[d] for d in axes)
    return tuple(sizes)
