"""At start, ranks must agree on config, plan, code and data; what differs is named."""

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from megatree.io.world import World
from megatree.parallel.model import ModelProgram

_PACKAGE = Path(__file__).resolve().parent.parent


def describe(value: Any, place: str = "") -> dict[str, str]:
    """Flatten a config (dataclasses, mappings, sequences) to field -> text."""
    if is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple) and any(is_dataclass(v) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {place or "value": repr(value)}
    out: dict[str, str] = {}
    for name, item in items:
        out.update(describe(item, f"{place}.{name}" if place else name))
    return out


def digest(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_facts(root: Path = _PACKAGE) -> dict[str, str]:
    """Return "code.<file>" -> hash of the package's source files, and the versions beneath."""
    facts = {
        f"code.{file.relative_to(root).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()[
            :16
        ]
        for file in sorted(root.rglob("*.py"))
    }
    return {"code.python": platform.python_version(), "code.torch": torch.__version__, **facts}


def plan_text(program: ModelProgram) -> str:
    """Return what a rank is about to run, constants included, as text: the same on all ranks."""
    parts = [program.explain()]
    parts += [str(part.graph) for part in program.programs()]
    # Graphs spell functions with their addresses, which differ between processes.
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(parts))


def check_agreement(world: World, facts: Mapping[str, str]) -> None:
    """Compare facts over all ranks.

    Args:
        world: the processes.
        facts: field -> text; keys in a meaningful order.

    Raises:
        ValueError: names the first field that differs, with both values and ranks.
    """
    hashes = world.gather(digest(repr(sorted(facts.items()))))
    if len(set(hashes)) == 1:
        return
    everywhere = world.gather(dict(facts))
    for field in dict.fromkeys(name for other in everywhere for name in other):
        for rank, other in enumerate(everywhere):
            mine = everywhere[0].get(field, "(absent)")
            found = other.get(field, "(absent)")
            if found != mine:
                raise ValueError(
                    f"start: {field} is {found} on rank {rank} and {mine} on rank 0. "
                    "Start every rank with the same configuration, code and data."
                )
