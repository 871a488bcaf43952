"""The units of a lowered model as functions over whole arrays, with the types of their inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optree

from megatree.functional.chain import Segment, Stack
from megatree.parallel.model import ModelProgram
from megatree.parallel.types import I


def unit_function(program: ModelProgram, name: str) -> Callable[..., Any]:
    """Return the function (w, carry, consts) -> (carry, out) of a unit such as "blocks.dense"."""
    segment = _segment(program, name)
    return partial(_apply, segment, program.model.cfg)


def unit_types(program: ModelProgram, name: str) -> tuple[Any, ...]:
    """Return the trees of types of (w, carry, consts), with I for R: before any widening."""
    unit = program.units[name].program
    types = [
        ty.with_kinds({axis: I for axis, kind in ty.kinds if kind == "R"})
        for ty in unit.types.values()
    ]
    return tuple(optree.tree_unflatten(unit.in_tree, types))


def _segment(program: ModelProgram, name: str) -> Segment:
    top, _, kind = name.partition(".")
    segment = program.model.segments[top]
    return segment.kinds[kind] if isinstance(segment, Stack) else segment


def _apply(segment: Segment, cfg: Any, w: Any, carry: Any, consts: Any) -> Any:
    return segment.apply(w, carry, consts, cfg)
