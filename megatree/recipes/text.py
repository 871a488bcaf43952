"""Documents out of a small text file."""

import json
import lzma
from pathlib import Path

from megatree.io.data.demo import load_demo


def read_texts(name: str) -> tuple[str, ...]:
    """Return the documents of "demo", a .jsonl or a .txt file, which may end in .xz.

    Raises:
        ValueError: the file is none of these, or damaged; by line where there are lines.
        OSError: it cannot be read.
    """
    if name == "demo":
        return load_demo().texts
    path = Path(name)
    text = _read(path)
    stem = path.name.removesuffix(".xz")
    if stem.endswith(".txt"):
        return (text,)
    if not stem.endswith(".jsonl"):
        raise ValueError(f"data.text: {path} is neither .jsonl nor .txt. Convert or rename it.")
    texts = []
    # Not splitlines: JSON may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}:{number}: no JSON object with a "text". Write one document per line, '
                'as {"text": "..."}.'
            ) from None
    return tuple(texts)


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"data.text: {path} is no UTF-8 text ({error}). Convert it.") from None
