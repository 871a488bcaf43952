"""The training state beside the arrays: plain values that msgpack gives back as they were."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgpack

_FIX = "Use None, bool, int of 64 bits, float, str, bytes, lists, and dicts with str keys."
_MOST_DEPTH = 64  # containers inside each other; far below where msgpack itself stops


def check_extra(value: Any, place: str, depth: int = 0) -> None:
    """Refuse what would not come back equal; a tuple is accepted and comes back as a list.

    Raises:
        ValueError: naming the first such value, for example "extra.data.position".
    """
    if depth > _MOST_DEPTH:
        raise ValueError(f"{place}: more than {_MOST_DEPTH} containers inside each other. {_FIX}")
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"{place}: the key {key!r} is {type(key).__name__}. {_FIX}")
            check_extra(item, f"{place}.{key}", depth + 1)
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_extra(item, f"{place}.{index}", depth + 1)
    elif type(value) is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{place}: an integer of {value.bit_length()} bits. {_FIX}")
    elif value is not None and type(value) not in (bool, float, str, bytes):
        raise ValueError(f"{place}: a value of type {type(value).__name__}. {_FIX}")


def packed(value: Any) -> bytes:
    """Return a value as msgpack."""
    return cast(bytes, msgpack.packb(value))


def fingerprints(extra: Mapping[str, Any]) -> dict[str, int]:
    """Return a checksum of each entry, the same whatever the order of its dicts."""
    return {key: zlib.crc32(packed(_ordered(value))) for key, value in extra.items()}


def differing(ranks: Sequence[Mapping[str, int]]) -> list[str]:
    """Return the keys whose fingerprints are not the same on every rank."""
    keys = sorted({key for rank in ranks for key in rank})
    return [key for key in keys if len({rank.get(key) for rank in ranks}) > 1]


def _ordered(value: Any) -> Any:
    if type(value) is dict:
        return {key: _ordered(value[key]) for key in sorted(value)}
    return [_ordered(item) for item in value] if type(value) in (list, tuple) else value
