"""Texts and recipes that the tests of preprocessing share."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatree.io.data.indexed import IndexedFile
from megatree.io.preprocess import Recipe
from megatree.io.tokenizers import TokenizerSpec

BYTES = Recipe(tokenizer=TokenizerSpec(kind="bytes"), append_eod=True)


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Write loose JSON."""
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
    return path


def documents(prefix: str | Path) -> list[list[list[int]]]:
    """All ids of a pair: documents of sequences."""
    file = IndexedFile(prefix)
    return [[one.tolist() for one in file.document(n)] for n in range(file.num_documents)]


def texts(prefix: str | Path) -> list[str]:
    """The texts of a pair of bytes."""
    return [
        "".join(bytes(token for token in one if token < 256).decode() for one in sequences)
        for sequences in documents(prefix)
    ]
