"""Numbers that a file of somebody else's states, each refused by its name where it is none."""

from collections.abc import Mapping
from typing import Any


def number(told: Mapping[str, Any], key: str, place: str, default: float | None = None) -> float:
    """Return the number under a key, or the default where the key is absent.

    Args:
        told: of a file of JSON.
        key: its name there.
        place: the file, for the message.
        default: None for a number that must be there.

    Raises:
        ValueError: it is absent, or something else than a number.
    """
    if key not in told and default is None:
        raise ValueError(f"{place}: lacks {key}. Copy it anew.")
    value = told.get(key, default)
    if not isinstance(value, (int, float)):
        raise ValueError(f"{place}: {key} is {value!r}, no number. Copy it anew.")
    return float(value)
