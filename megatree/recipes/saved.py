"""A config as JSON and back: what is saved beside checkpoints can be read, edited, loaded."""

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatree.models.gpt_config import GPTConfig
from megatree.models.moe_config import MoEConfig
from megatree.recipes.config import RunConfig
from megatree.recipes.words import did_you_mean

CONFIG_FILE = "config.json"


def to_plain(cfg: RunConfig) -> dict[str, Any]:
    """Return a config as dicts, lists, texts and numbers."""
    return json.loads(json.dumps(asdict(cfg)))


def from_plain(plain: Any, place: str = "config") -> RunConfig:
    """Build a config from what `to_plain` gave.

    Raises:
        ValueError: a field is unknown, missing or of another type, or the config is contradictory.
    """
    return _read(RunConfig, plain, place)


def to_json(cfg: RunConfig) -> str:
    """Return a config as JSON for people."""
    return json.dumps(to_plain(cfg), indent=2) + "\n"


def load_config(path: str | Path) -> RunConfig:
    """Read a config from a JSON file.

    Raises:
        ValueError: the file is no JSON, or no config (see `from_plain`).
        OSError: it cannot be read.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}). Give a saved {CONFIG_FILE}.") from None
    return from_plain(plain, str(path))


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return dotted field -> (old value, new value) for the fields that differ."""
    before, after = _flat(to_plain(old)), _flat(to_plain(new))
    names = dict.fromkeys([*before, *after])
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out


def _read(hint: Any, value: Any, place: str) -> Any:
    """Turn a plain value into one of the hinted type."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _read_fields(hint, _expect(value, dict, place), place)
    if origin is dict:
        table = _expect(value, dict, place)
        return {key: _read(args[1], item, f"{place}.{key}") for key, item in table.items()}
    if origin is tuple:
        items = _expect(value, list, place)
        hints = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(hints) != len(items):
            raise ValueError(f"{place}: {len(items)} values. Give {len(hints)}.")
        return tuple(_read(h, item, place) for h, item in zip(hints, items, strict=True))
    if origin in (Union, types.UnionType):
        return None if value is None else _read(args[0], value, place)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{place}: {value!r}. Use one of {', '.join(args)}.")
        return value
    if hint is float and type(value) is int:
        return float(value)
    return _expect(value, hint, place)


def _read_fields(kind: Any, table: Mapping[str, Any], place: str) -> Any:
    if kind is GPTConfig and "experts" in table:
        kind = MoEConfig
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    for name in table:
        if name not in known:
            raise ValueError(
                f"{place}: no field {name!r}{did_you_mean(name, known)}. "
                f"Fields are {', '.join(known)}."
            )
    needed = [
        f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING
    ]
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{place}: lacks {', '.join(missing)}. Add what is missing.")
    values = {name: _read(hints[name], item, f"{place}.{name}") for name, item in table.items()}
    return kind(**values)


def _expect(value: Any, kind: Any, place: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{place}: {value!r} is {type(value).__name__}. Give {kind.__name__}.")
    return value
