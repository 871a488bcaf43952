"""A tiktoken vocabulary: ranks of byte strings, a pattern, special tokens at either end."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatree.io.optional import optional
from megatree.io.tokenizers.identity import digest
from megatree.io.tokenizers.protocol import refuse_foreign_ids
from megatree.io.tokenizers.special import Special

# How text is cut before merging, by name. "v1" and "v2" are the names Megatron gives them.
_LETTERS_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "v1": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "v2": rf"{_LETTERS_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    "cl100k": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TiktokenTokenizer:
    """Wraps a tiktoken encoding; see the protocol for the laws.

    Attributes:
        encoding: the library's object; its ids start at 0.
        offset: special tokens before the first rank; an id is `offset` + rank.
        marks: spelling -> id of the special tokens.
        vocab_size: ranks and special tokens.
        special: the special ids.
        identity: digest of ranks, pattern and special tokens.
    """

    encoding: Any
    offset: int
    marks: dict[str, int]
    vocab_size: int
    special: Special
    identity: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._shifted(self.encoding.encode_ordinary(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are spelled out."""
        ranks = self.encoding.encode(text, allowed_special="all")
        first = self.encoding.n_vocab - len(self.marks)
        own = list(self.marks.values())
        return [own[rank - first] if rank >= first else rank + self.offset for rank in ranks]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        refuse_foreign_ids(ids, self.vocab_size)
        spelled = {token: spelling.encode() for spelling, token in self.marks.items()}
        return b"".join(
            spelled[token]
            if token in spelled
            else self.encoding.decode_single_token_bytes(token - self.offset)
            for token in map(int, ids)
        ).decode("utf-8", errors="replace")

    def piece(self, token: int) -> str:
        """Return the bytes of one id as text."""
        return self.decode([token])

    def _shifted(self, ranks: list[int]) -> list[int]:
        return [rank + self.offset for rank in ranks] if self.offset else ranks


def load_tiktoken(
    path: Path,
    *,
    pattern: str = "v2",
    special: Sequence[str] = ("<unk>", "<s>", "</s>"),
    num_special: int = 1000,
    max_ranks: int | None = None,
) -> TiktokenTokenizer:
    """Return the tokenizer of a vocabulary of ranks.

    A `.json` file (a list of objects with `rank` and `token_bytes`) has its special tokens in
    front, `num_special` ids filled up with <SPECIAL_n>, as Megatron does. A `.tiktoken` file (a
    line: bytes in base64, rank) has them behind the ranks, and only those named.

    A document ends with </s> or <|endoftext|>, whichever is among the special tokens.

    Args:
        path: the file.
        pattern: "v1", "v2", "cl100k", or a regular expression.
        special: spellings of the special tokens, in order of their ids.
        num_special: ids kept free in front of the ranks of a `.json` file.
        max_ranks: use only the first of them.

    Raises:
        ValueError: if `tiktoken` is not installed, or the file is damaged.
    """
    library = optional("tiktoken", extra="data", purpose=str(path))
    leading = path.suffix == ".json"
    ranks = (_read_json if leading else _read_lines)(path)[:max_ranks]
    names = list(special)
    if leading:
        if len(names) > num_special:
            raise ValueError(
                f"{path}: {len(names)} special tokens do not fit in {num_special} ids. "
                f"Set num_special to {len(names)} or more."
            )
        names += [f"<SPECIAL_{number}>" for number in range(len(names), num_special)]
    offset = len(names) if leading else 0
    first = 0 if leading else len(ranks)
    marks = {spelling: first + number for number, spelling in enumerate(names)}
    regex = PATTERNS.get(pattern, pattern)
    encoding = library.Encoding(
        name=path.name,
        pat_str=regex,
        mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        special_tokens={spelling: len(ranks) + number for number, spelling in enumerate(names)},
    )
    end = next((name for name in ("<|endoftext|>", "</s>") if name in marks), None)
    ids = Special(
        eod=None if end is None else marks[end],
        eos=None if end is None else marks[end],
        bos=marks.get("<s>"),
        unk=marks.get("<unk>"),
        mask=marks.get("<mask>"),
        pad=marks.get("<pad>"),
    )
    facts = {"ranks": b"".join(b"%d:%b" % (len(token), token) for token in ranks)}
    return TiktokenTokenizer(
        encoding=encoding,
        offset=offset,
        marks=marks,
        vocab_size=len(ranks) + len(names),
        special=ids,
        identity=digest("tiktoken", {**facts, "pattern": regex, "marks": marks}, ids),
    )


def _read_json(path: Path) -> list[bytes]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(rows, dict):  # the list may stand under "vocab", beside settings
            rows = rows["vocab"]
        entries = [(row["rank"], base64.b64decode(row["token_bytes"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: it is no list of rank and token_bytes: {error!r}. Give a tiktoken JSON file."
        ) from error
    return _ordered(path, entries)


def _read_lines(path: Path) -> list[bytes]:
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            entries.append((int(rank), base64.b64decode(token, validate=True)))
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: {line[:40]!r} is not base64 and a rank. Give a .tiktoken file."
            ) from error
    return _ordered(path, entries)


def _ordered(path: Path, entries: Sequence[tuple[int, bytes]]) -> list[bytes]:
    entries = sorted(entries)
    if [rank for rank, _ in entries] != list(range(len(entries))):
        raise ValueError(
            f"{path}: its {len(entries)} ranks are not 0..{len(entries) - 1}, each once. "
            "Give an intact file."
        )
    tokens = [token for _, token in entries]
    missing = 256 - len({token for token in tokens if len(token) == 1})
    if missing:
        raise ValueError(
            f"{path}: {missing} of 256 single bytes have no rank. Give an intact file."
        )
    return tokens
