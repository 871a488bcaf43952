"""A Hugging Face tokenizer.json, its special tokens named by the files beside it or by the user."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatree.io.tokenizers.fast import FastTokenizer
from megatree.io.tokenizers.identity import digest
from megatree.io.tokenizers.special import Special

ROLES = ("eod", "bos", "eos", "pad", "unk", "mask", "cls", "sep")
SENTINEL = re.compile(r"<extra_id_(\d+)>")


def load_tokenizer_json(path: Path, *, roles: Mapping[str, str] | None = None) -> FastTokenizer:
    """Return the tokenizer of a file `tokenizer.json`, or of the folder that holds it.

    Truncation and padding stored in the file are switched off. The roles of its tokens come from
    `tokenizer_config.json` and `special_tokens_map.json` beside it, then from `roles`, which win.
    A document ends with `eod`, by default the `eos` token. Entries `<extra_id_N>` are sentinels.

    Args:
        path: the file or the folder.
        roles: role -> spelling; roles are eod, bos, eos, pad, unk, mask, cls, sep.

    Raises:
        ValueError: if the file cannot be read as one, or a spelling is not in its vocabulary.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    text = file.read_text(encoding="utf-8")
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(
            f"{file}: it is no tokenizer.json: {error}. Give the file of a `tokenizers` tokenizer."
        ) from error
    special = _special(file, backend, roles or {})
    facts = json.loads(text)
    for setting in ("truncation", "padding", "post_processor"):
        facts.pop(setting, None)
    return FastTokenizer(
        backend=backend, special=special, identity=digest("hf", {"json": facts}, special)
    )


def _special(file: Path, backend: Tokenizer, named: Mapping[str, str]) -> Special:
    told = _roles_beside(file) | dict(named)
    ids: dict[str, Any] = {}
    for role, spelling in told.items():
        token = backend.token_to_id(spelling)
        if token is None and role in named:
            raise ValueError(
                f"{file}: its {backend.get_vocab_size()} entries lack {spelling!r}, named as "
                f"{role}. Name an entry it has."
            )
        ids[role] = token
    ids.setdefault("eod", ids.get("eos"))
    found = sorted(
        (int(match[1]), token)
        for spelling, token in backend.get_vocab(with_added_tokens=True).items()
        if (match := SENTINEL.fullmatch(spelling))
    )
    return Special(**ids, sentinels=tuple(token for _, token in found))


def _roles_beside(file: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = file.with_name(name)
        if not beside.exists():
            continue
        told = json.loads(beside.read_text(encoding="utf-8"))
        for role in ROLES:
            token = told.get(f"{role}_token")
            spelling = token.get("content") if isinstance(token, dict) else token
            if spelling is not None:
                found[role] = spelling
    return found
