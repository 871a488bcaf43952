"""Conversations to tokens on disk: what the assistant wrote is learned, the rest is context."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatree.io.data.chat_template import ChatTemplate, Piece
from megatree.io.data.indexed import IndexedFile, IndexedWriter
from megatree.io.data.packed import PackedDataset, TooLong, packed_dataset

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


def read_conversations(
    path: str | os.PathLike[str], *, report: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of each line of a JSONL file; the place is "file:line".

    A line that cannot be read yields the error in place of its value, for the caller to decide.

    Args:
        path: the file.
        report: called with the bytes of each line.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            report(len(line))
            place = f"{os.fspath(path)}:{number}"
            if len(line) > _LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_LINE)
                    report(len(line))
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
    flags = [
        np.full(len(ids), learned, np.uint8)
        for ids, (_, learned) in zip(encoded, pieces, strict=True)
    ]
    return np.concatenate(encoded), np.concatenate(flags)


def chat_dataset(
    prefix: str | os.PathLike[str],
    seq: int,
    *,
    packing: Literal["packed", "single"] = "packed",
    too_long: TooLong = "stop",
) -> PackedDataset:
    """Open what `encode_chats` wrote and lay the conversations into rows; see `packed_dataset`."""
    name = os.fspath(prefix)
    return packed_dataset(
        IndexedFile(f"{name}_tokens"),
        seq,
        learned=IndexedFile(f"{name}_learned"),
        packing=packing,
        too_long=too_long,
    )
