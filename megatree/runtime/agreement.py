"""At start, ranks must agree on config, plan, code and data; what differs is named."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from megatree.io.world import World
from megatree.parallel.model import ModelProgram


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


def code_version() -> str:
    """Return a hash of the package's source files."""
    root = Path(__file__).resolve().parent.parent
    whole = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        whole.update(file.relative_to(root).as_posix().encode())
        whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


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
    for field in facts:
        for rank, other in enumerate(everywhere):
            mine = everywhere[0].get(field, "(absent)")
            found = other.get(field, "(absent)")
            if found != mine:
                raise ValueError(
                    f"start: {field} is {found} on rank {rank} and {mine} on rank 0. "
                    "Start every rank with the same configuration, code and data."
                )
    extra = {field for other in everywhere for field in other} - set(facts)
    raise ValueError(f"start: only some ranks have {sorted(extra)}. Start every rank alike.")
