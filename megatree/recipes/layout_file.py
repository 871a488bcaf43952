"""The layout of a run as a file of its own: what cuts the model, apart from the model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatree.recipes.config import RunConfig
from megatree.recipes.saved import from_plain, to_plain
from megatree.recipes.words import did_you_mean

LAYOUT_FIELDS = ("mesh", "rules", "pipeline", "context", "storage", "remat")
"""The fields of a config that decide how it is cut, and nothing of what it computes."""


def layout_to_plain(cfg: RunConfig) -> dict[str, Any]:
    """Return the layout of a run as dicts, lists, texts and numbers."""
    plain = to_plain(cfg)
    return {name: plain[name] for name in LAYOUT_FIELDS}


def save_layout(cfg: RunConfig, path: str | Path) -> None:
    """Write the layout of a run as JSON; `with_layout` reads it."""
    text = json.dumps(layout_to_plain(cfg), indent=2) + "\n"
    Path(path).write_text(text, encoding="utf-8")


def with_layout(cfg: RunConfig, path: str | Path) -> RunConfig:
    """Return a config under the layout in a file: a saved layout, or the config.json of a run.

    Raises:
        ValueError: the file is no JSON, holds no layout, or one that this run cannot have.
        OSError: it cannot be read.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}). Give a saved layout.") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: {type(plain).__name__}. Give a saved layout, an object.")
    if "model" not in plain:
        for name in plain:
            if name not in LAYOUT_FIELDS:
                raise ValueError(
                    f"{path}: no field {name!r}{did_you_mean(name, LAYOUT_FIELDS)}. "
                    f"A layout has {', '.join(LAYOUT_FIELDS)}."
                )
    found = {name: plain[name] for name in LAYOUT_FIELDS if name in plain}
    if not found:
        raise ValueError(f"{path}: no layout. Give {', '.join(LAYOUT_FIELDS)}.")
    read = from_plain({**to_plain(cfg), **found}, str(path))
    return replace(cfg, **{name: getattr(read, name) for name in found})


def is_layout(path: str | Path) -> bool:
    """Whether a file holds a layout alone, not a whole config."""
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(plain, dict) and bool(plain) and set(plain) <= set(LAYOUT_FIELDS)
