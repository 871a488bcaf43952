"""Who a tokenizer is: one digest, stored beside data and in checkpoints, and compared."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatree.io.tokenizers.special import Special


def digest(kind: str, facts: Mapping[str, Any], special: Special) -> str:
    """Return the identity of a tokenizer: a hash of its kind, its vocabulary, its special ids.

    Args:
        kind: the algorithm.
        facts: all else that decides an id; values are JSON or bytes.
        special: the special ids.

    >>> digest("null", {"vocab_size": 9}, Special(eod=8))[:19]
    'sha256:d4582aad99e0'
    """
    told = {"kind": kind, "special": asdict(special), **facts}
    text = json.dumps(told, sort_keys=True, ensure_ascii=True, default=_of_bytes)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def require_same_identity(
    place: str, found: str | None, expected: str | None, *, of: str = "the model"
) -> None:
    """Refuse to go on with ids of one tokenizer and a vocabulary of another.

    Args:
        place: what holds the ids (a file prefix).
        found: the identity stored there; None if none is (a pair that another program wrote).
        expected: the identity to compare with; None if it is not known.
        of: whose identity `expected` is.

    Raises:
        ValueError: if both are known and differ.
    """
    if found is not None and expected is not None and found != expected:
        raise ValueError(
            f"{place}: its ids come from tokenizer {found[:19]}, but {of} was made with "
            f"{expected[:19]}. Use the tokenizer that made both, or preprocess the text again."
        )


def _of_bytes(value: object) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    raise TypeError(f"digest: {type(value).__name__} is neither JSON nor bytes")
