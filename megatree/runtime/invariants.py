"""Copies on several ranks must stay equal, bit for bit; the first leaf that drifted is named."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatree.functional.param import Box
from megatree.io.world import World
from megatree.parallel.layout import PIPELINE, spec_box
from megatree.parallel.packing import Group
from megatree.runtime.bits import hash_bits
from megatree.runtime.step import TrainState, TrainStep

_MOST = 8
"""Ranks of a kind that a message lists."""


class _Held(NamedTuple):
    """A piece of a leaf that a rank holds.

    Args:
        what: "params", "opt.m" and such.
        path: of the leaf.
        layer: index within its kind, or None.
        box: global (start, stop) per dim: ranks with the same piece hold copies.
    """

    what: str
    path: str
    layer: int | None
    box: Box

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" (layer {self.layer})"
        return f"{self.what}.{self.path}{layer}"


def check_invariant(
    step: TrainStep, state: TrainState, world: World, *, facts: Mapping[str, Any] | None = None
) -> None:
    """Compare what ranks hold copies of; every rank calls it after the same step.

    Parameters, moments and master weights are hashed on the device, those that a rank holds alone
    left out; who holds copies follows from types and storage, tied leaves of several stages
    included. One hash per set of copies travels, in one gather; more only when something differs.

    Args:
        step: the bound step.
        state: its state.
        world: the processes.
        facts: small values that all ranks share (consumed samples, seed), beside the counters of
            the state.

    Raises:
        ValueError: on all ranks; names the first leaf or fact that differs, with both ranks.
    """
    if world.size == 1:
        return
    shared = {**state.counters(), **(facts or {})}
    copies = _copies(step, state)
    values: list[int] = []
    if copies:
        values = torch.stack([hash_bits(x) for _, _, x in copies]).tolist()
    sets: dict[str, list[tuple[_Held, int]]] = {}
    for (name, held, _), value in zip(copies, values, strict=True):
        sets.setdefault(name, []).append((held, value))
    told = {name: _digest(repr(pieces)) for name, pieces in sets.items()}
    everywhere = world.gather({"facts": _digest(repr(sorted(shared.items()))), **told})
    if _agree(everywhere):
        return
    _refuse_facts(world, state.step, shared)
    _refuse_leaves(step, world, state.step, [piece for pieces in sets.values() for piece in pieces])


def _agree(everywhere: list[dict[str, str]]) -> bool:
    """Whether ranks say the same of everything that they hold copies of."""
    seen: dict[str, str] = {}
    return all(
        seen.setdefault(name, value) == value for told in everywhere for name, value in told.items()
    )


def _copies(step: TrainStep, state: TrainState) -> list[tuple[str, _Held, Tensor]]:
    """Return (name of a set of ranks, piece, its elements) of what others hold copies of.

    Ranks with a set's name in common hold the same pieces of it, in the same order.
    """
    return [
        (name, held, x)
        for group in step.groups
        for level, what, buffer in _buffers(group, state)
        for held, x in _pieces(step, group, level, what, buffer)
        if (name := _holders(step, group, level, held)) is not None
    ]


def _buffers(group: Group, state: TrainState) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (level, name, buffer) of all that is kept of a group."""
    yield "params", "params", state.params[group.name]
    for name, buffers in {**state.opt, "master": state.master}.items():
        if group.name in buffers:
            yield "opt", f"opt.{name}", buffers[group.name]


def _pieces(
    step: TrainStep, group: Group, level: str, what: str, buffer: Tensor
) -> Iterator[tuple[_Held, Tensor]]:
    parts = group.num_parts(level)
    for leaf in group.leaves:
        ty = step.program.types[leaf.path]
        spec = tuple(
            (*axes, *group.axes(level)) if dim == leaf.dim else axes
            for dim, axes in enumerate(ty.spec)
        )
        box = spec_box(spec, ty.shape, step.comm.sizes, step.comm.coords)
        for row in range(group.num_rows):
            view = (
                group.packed(buffer[row], leaf, parts)
                if parts > 1
                else group.whole(buffer[row], leaf)
            )
            yield _Held(what, leaf.path, group.layer(row), box), view


def _holders(step: TrainStep, group: Group, level: str, held: _Held) -> str | None:
    """Name the set of ranks that hold copies of a piece; None if this rank alone holds it."""
    ty, comm = step.program.types[held.path], step.comm
    axes = {axis for axis, _ in ty.kinds} - set(group.axes(level))
    if not axes and not group.holders:
        return None
    rest = {axis: at for axis, at in comm.coords.items() if axis not in axes}
    if group.holders:  # a tied leaf: all its stages hold it
        rest[PIPELINE] = -1
        return f"{held.path} at {sorted(rest.items())}"
    return f"at {sorted(rest.items())}"


def _refuse_facts(world: World, step: int, shared: Mapping[str, Any]) -> None:
    everywhere = world.gather({name: repr(value) for name, value in shared.items()})
    for name in shared:
        values = [facts.get(name, "(absent)") for facts in everywhere]
        if len(set(values)) > 1:
            raise ValueError(
                f"step {step}: {name} is {_by_rank(values)}. All ranks must count alike: give "
                "every rank the same configuration, and resume from the last checkpoint."
            )


def _refuse_leaves(
    step: TrainStep, world: World, number: int, prints: list[tuple[_Held, int]]
) -> None:
    everywhere = world.gather(prints)
    order = {path: at for at, path in enumerate(step.program.types)}
    found: dict[_Held, dict[int, int]] = {}
    for rank, pieces in enumerate(everywhere):
        for held, value in pieces:
            found.setdefault(_Held(*held), {})[rank] = value
    drifted = [held for held, values in found.items() if len(set(values.values())) > 1]
    drifted.sort(
        key=lambda h: (h.what != "params", order.get(h.path, 0), h.layer or 0, h.what, h.box)
    )
    values = found[drifted[0]]
    others = f", and {len(drifted) - 1} more pieces" if len(drifted) > 1 else ""
    raise ValueError(
        f"step {number}: {drifted[0]}{others} drifted: copies that must be equal hash to "
        f"{_by_rank({rank: f'{value & ((1 << 64) - 1):016x}' for rank, value in values.items()})}. "
        "Resume from the last checkpoint; if the same rank drifts again, replace its device, "
        "else look for a kernel that is not deterministic."
    )


def _by_rank(values: Any) -> str:
    """Say who has which value, the rarest value first: "1 on rank 2, 5 on ranks 0, 1"."""
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    ranks: dict[Any, list[int]] = {}
    for rank, value in pairs:
        ranks.setdefault(value, []).append(rank)
    parts = []
    for value, held in sorted(ranks.items(), key=lambda item: (len(item[1]), -item[1][0])):
        names = ", ".join(map(str, held[:_MOST])) + (", ..." if len(held) > _MOST else "")
        parts.append(f"{value} on rank{'s' * (len(held) > 1)} {names}")
    return ", ".join(parts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
