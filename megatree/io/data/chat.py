"""Conversations as training data: what the assistant wrote is learned, the rest is context."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, Integer

from megatree.io.data.chat_template import ChatTemplate, Piece
from megatree.io.data.dataset import Batch, check_ids, digest, select_columns
from megatree.io.data.indexed import IndexedFile, IndexedWriter
from megatree.io.data.packing import pack

_LONGEST_LINE = 1 << 26  # bytes


@dataclass(frozen=True, kw_only=True)
class ChatReport:
    """What became of the conversations.

    Attributes:
        written: conversations in the files.
        tokens: of these.
        learned: tokens of these that are learned.
        skipped: reason -> conversations left out.
    """

    written: int
    tokens: int
    learned: int
    skipped: dict[str, int]


def read_conversations(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each line of a JSONL file; the place is "file:line".

    A line that cannot be read yields the error in place of its value, for the caller to decide.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            place = f"{os.fspath(path)}:{number}"
            if len(line) > _LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_LINE)
                yield place, ValueError(f"line of more than {_LONGEST_LINE} bytes")
            elif line.strip():
                try:
                    yield place, json.loads(line)
                except ValueError as error:  # also what is not UTF-8
                    yield place, ValueError(f"no JSON ({error})")


def encode_chats(
    conversations: Iterable[tuple[str, Any]],
    prefix: str | os.PathLike[str],
    template: ChatTemplate,
    encode: Callable[[str], Sequence[int]],
    *,
    dtype: Any,
    reserved: Sequence[str] = (),
    bad: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
) -> ChatReport:
    """Write conversations as two pairs: `{prefix}_tokens`, and `{prefix}_learned` of 0 and 1.

    Every piece of the text is encoded by itself, so that training sees the tokens that a server
    sees, whose prompt also ends where the assistant begins.

    Args:
        conversations: (place, value); a value is a mapping with "messages", a list of mappings with
            "role" and "content"; its other entries ("tools") are variables of the template.
        prefix: path of the pairs.
        template: turns messages into text.
        encode: text -> ids; knows the special tokens of the template and adds none.
        dtype: of the ids, see `token_dtype`.
        reserved: texts that no message may hold: the special tokens, which would otherwise let
            data speak in another role.
        bad: stop at, or leave out and count, a conversation that cannot be used.
        overwrite: replace pairs of this name.

    Raises:
        ValueError: a conversation cannot be used, by place and reason; or the pairs exist.
    """
    counts, skipped = Counter[str](), Counter[str]()
    with ExitStack() as stack:
        tokens = stack.enter_context(
            IndexedWriter(f"{os.fspath(prefix)}_tokens", dtype, overwrite=overwrite)
        )
        learned = stack.enter_context(
            IndexedWriter(f"{os.fspath(prefix)}_learned", np.uint8, overwrite=overwrite)
        )
        for place, value in conversations:
            try:
                pieces = _render(value, template, reserved)
                ids, flags = _encode(pieces, encode)
            except ValueError as error:
                if bad == "stop":
                    raise ValueError(f"{place}: {error}") from error
                skipped[str(error)] += 1
                continue
            tokens.add_document([ids])
            learned.add_document([flags])
            counts["tokens"] += len(ids)
            counts["learned"] += int(flags.sum())
        return ChatReport(
            written=tokens.num_documents,
            tokens=counts["tokens"],
            learned=counts["learned"],
            skipped=dict(skipped),
        )


def _render(value: Any, template: ChatTemplate, reserved: Sequence[str]) -> list[Piece]:
    if isinstance(value, ValueError):
        raise value
    messages = value.get("messages") if isinstance(value, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('has no list "messages". Give one, or leave the line out.')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {number} has no text "role". Give one.')
        for text in _texts(message):
            if found := [word for word in reserved if word in text]:
                raise ValueError(
                    f"message {number} holds the special token {found[0]!r}. Remove it."
                )
    variables = {name: entry for name, entry in value.items() if name != "messages"}
    pieces = template.pieces(messages, variables=variables)
    if not any(learned for _, learned in pieces):
        raise ValueError("nothing is learned: no message of the assistant. Leave it out.")
    return pieces


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _encode(
    pieces: Sequence[Piece], encode: Callable[[str], Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    encoded = [np.asarray(encode(text), np.int64).reshape(-1) for text, _ in pieces]
    flags = [np.full(len(ids), learned, np.uint8) for ids, (_, learned) in zip(encoded, pieces)]
    return np.concatenate(encoded), np.concatenate(flags)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatDataset:
    """Rows of whole conversations, padded; attention and positions begin anew at each.

    A conversation of n tokens takes n - 1 columns: each of its tokens but the first is a label.

    Attributes:
        tokens: ids, a conversation per sequence.
        learned: 1 where a token is learned as a label, else 0.
        seq: columns of a row.
        rows_of: the conversations of all rows.
        bounds: row r holds `rows_of[bounds[r]:bounds[r + 1]]`.
        dropped: conversations that are in no row: too long, or nothing to learn.
    """

    tokens: IndexedFile
    learned: IndexedFile
    seq: int
    rows_of: Int64[np.ndarray, " num_items"]
    bounds: Int64[np.ndarray, " num_bounds"]
    dropped: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def identity(self) -> str:
        """Digest of the files and of the rows."""
        return digest(
            kind="chat",
            tokens=self.tokens.identity,
            learned=self.learned.identity,
            seq=self.seq,
            rows=[len(self), len(self.rows_of), *self.bounds[:8].tolist()],
        )

    def verify(self) -> None:
        """Raise a ValueError if a file changed."""
        self.tokens.verify()
        self.learned.verify()

    def rows(
        self,
        ids: Integer[np.ndarray, " n"],
        columns: Integer[np.ndarray, " t"] | None = None,
    ) -> Batch:
        """Return `tokens`, `labels`, `weights`, `positions` and `segments` [n, seq].

        Padding is token 0 of weight 0, in a segment of its own.
        """
        check_ids("ChatDataset", ids, len(self))
        shape = len(ids), self.seq
        out: Batch = {
            name: np.zeros(shape, np.int64) for name in ("tokens", "labels", "positions")
        }
        out["segments"] = np.zeros(shape, np.int64)
        out["weights"] = np.zeros(shape, np.float32)
        for row, number in enumerate(ids.tolist()):
            at = 0
            items = self.rows_of[self.bounds[number] : self.bounds[number + 1]].tolist()
            for segment, item in enumerate(items):
                text = self.tokens[item][: self.seq + 1]
                here = slice(at, at + len(text) - 1)
                out["tokens"][row, here], out["labels"][row, here] = text[:-1], text[1:]
                out["weights"][row, here] = self.learned[item][1 : self.seq + 1]
                out["segments"][row, here] = segment
                out["positions"][row, here] = np.arange(len(text) - 1)
                at = here.stop
            out["segments"][row, at:] = len(items)
        return select_columns(out, columns)


def chat_dataset(
    prefix: str | os.PathLike[str],
    seq: int,
    *,
    packing: Literal["packed", "single"] = "packed",
    too_long: Literal["drop", "cut", "stop"] = "stop",
) -> ChatDataset:
    """Open what `encode_chats` wrote and lay the conversations into rows.

    Args:
        prefix: path of the pairs.
        seq: columns of a row.
        packing: several conversations in a row where they fit, or one.
        too_long: what to do with a conversation of more than seq + 1 tokens: leave it out, keep
            its beginning, or refuse it.

    Raises:
        ValueError: the two pairs differ, or a conversation is too long.
    """
    name = os.fspath(prefix)
    tokens, learned = IndexedFile(f"{name}_tokens"), IndexedFile(f"{name}_learned")
    if not np.array_equal(tokens.lengths, learned.lengths):
        raise ValueError(
            f"{name}_tokens and {name}_learned: their conversations differ in length. "
            "Encode them again."
        )
    lengths = np.array(tokens.lengths, np.int64)
    over = lengths > seq + 1
    if over.any() and too_long == "stop":
        bad = int(np.argmax(over))
        raise ValueError(
            f"{name}_tokens: conversation {bad} has {lengths[bad]} tokens, and rows hold {seq + 1}. "
            f"{int(over.sum())} are too long: drop or cut them, or raise seq."
        )
    keep = _learns_something(learned, lengths, seq + 1)
    if too_long == "drop":
        keep &= ~over
    items = np.flatnonzero(keep)
    widths = np.minimum(lengths[items], seq + 1) - 1
    if packing == "packed":
        order, bounds = pack(widths, seq)
    else:
        order, bounds = np.arange(len(items)), np.arange(len(items) + 1)
    return ChatDataset(
        tokens=tokens,
        learned=learned,
        seq=seq,
        rows_of=items[order],
        bounds=bounds,
        dropped=len(lengths) - len(items),
    )


def _learns_something(learned: IndexedFile, lengths: np.ndarray, longest: int) -> np.ndarray:
    """Return for each conversation whether a label is learned within `longest` tokens."""
    before = np.concatenate([[0], np.cumsum(learned.tokens, dtype=np.int64)])
    first = learned.starts(np.arange(len(lengths)))
    # The first token is no label.
    return before[first + np.minimum(lengths, longest)] > before[np.minimum(first + 1, before.size - 1)]
