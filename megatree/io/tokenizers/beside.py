"""What is stored beside a pair of data files: the tokenizer that made the ids, and from what."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatree.io.data.atomic import atomic_write
from megatree.io.tokenizers.identity import require_same_identity
from megatree.io.tokenizers.protocol import Tokenizer
from megatree.io.tokenizers.spec import TokenizerSpec

FORMAT = "megatree.data/1"


def path_beside(prefix: str | os.PathLike[str]) -> Path:
    """Return where the facts of a pair are stored."""
    return Path(f"{os.fspath(prefix)}.meta.json")


def tokenizer_facts(tokenizer: Tokenizer, spec: TokenizerSpec | None = None) -> dict[str, Any]:
    """Return what is stored of a tokenizer: enough to compare it, and to load it again here."""
    facts: dict[str, Any] = {
        "identity": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "special": tokenizer.special.named(),
    }
    return facts if spec is None else {**facts, "spec": spec.to_json()}


def write_beside(prefix: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Store facts beside a pair, whole or not at all."""
    with atomic_write(path_beside(prefix)) as file:
        text = json.dumps({"format": FORMAT, **facts}, indent=1, ensure_ascii=True)
        file.write(text.encode() + b"\n")


def read_beside(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the facts stored beside a pair; None if there are none (Megatron writes none).

    Raises:
        ValueError: if the file is not ours.
    """
    path = path_beside(prefix)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: it is no JSON: {error}. Remove it, or make it again.") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{path}: it is not of format {FORMAT}. Remove it, or make it again.")
    return facts


def identity_beside(prefix: str | os.PathLike[str]) -> str | None:
    """Return the identity of the tokenizer that made a pair; None if it is not known."""
    return ((read_beside(prefix) or {}).get("tokenizer") or {}).get("identity")


def require_tokenizer(
    prefix: str | os.PathLike[str], expected: str | None, *, of: str = "the model"
) -> None:
    """Refuse a pair whose ids come from another tokenizer than `expected`.

    Raises:
        ValueError: if both identities are known and differ.
    """
    require_same_identity(os.fspath(prefix), identity_beside(prefix), expected, of=of)
