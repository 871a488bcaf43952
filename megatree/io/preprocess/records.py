"""From the bytes of one line to the texts of its document, or the reason why there are none."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatree.io.preprocess.blocks import BadLine, Block, Rows, Unit, too_long

Texts = dict[str, list[str]]

_PARAGRAPHS = re.compile(rb"\n(?:[ \t\r]*\n)+")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RecordError(Exception):
    """A record that gives no document: the kind of the reason, and its words."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


def json_records(
    block: Block, keys: Sequence[str], *, max_line_bytes: int
) -> Iterator[tuple[int, Texts] | BadLine]:
    """Yield (line, texts by key) of each line of loose JSON; blank lines are passed over."""
    for line, raw in numbered_lines(block):
        if len(raw) > max_line_bytes:
            yield too_long(block.file, line, len(raw), max_line_bytes)
            continue
        try:
            yield line, texts_of(parse_line(raw), keys)
        except RecordError as bad:
            yield BadLine(file=block.file, line=line, kind=bad.kind, detail=bad.detail)


def row_records(table: Rows, keys: Sequence[str]) -> Iterator[tuple[int, Texts] | BadLine]:
    """Yield (row, texts by key) of each row of a table."""
    for row, record in enumerate(table.rows, table.first_row):
        try:
            yield row, texts_of(record, keys)
        except RecordError as bad:
            yield BadLine(file=table.file, line=row, kind=bad.kind, detail=bad.detail)


def text_records(
    block: Block, key: str, unit: Unit, *, max_line_bytes: int
) -> Iterator[tuple[int, Texts] | BadLine]:
    """Yield (line, text) of each document of plain text; those without text are passed over.

    A file that is one document keeps its every character; a line or a paragraph is stripped.
    """
    for line, raw in _units(_without_mark(block), block.first_line, unit):
        if len(raw) > max_line_bytes:
            yield too_long(block.file, line, len(raw), max_line_bytes)
            continue
        try:
            text = decode(raw)
        except RecordError as bad:
            yield BadLine(file=block.file, line=line, kind=bad.kind, detail=bad.detail)
            continue
        if text.strip():
            yield line, {key: [text if unit == "file" else text.strip()]}


def numbered_lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a block with their numbers, blank ones left out."""
    for line, raw in enumerate(_without_mark(block).split(b"\n"), block.first_line):
        if raw and not raw.isspace():
            yield line, raw


def parse_line(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that a line spells.

    Raises:
        RecordError: if it is no UTF-8, no JSON, or no object.
    """
    text = decode(raw)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError("not JSON", f"not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise RecordError("not JSON", "JSON nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise RecordError("not JSON", f"not JSON that Python reads: {error}") from error
    if not isinstance(record, dict):
        raise RecordError("no object", f"a JSON {type(record).__name__}, not an object with keys")
    return record


def texts_of(record: Mapping[str, Any], keys: Sequence[str]) -> Texts:
    """Return the text, or the texts of a list, under each key.

    Raises:
        RecordError: if a key is missing, or its value is no text or holds a lone surrogate.
    """
    return {key: _texts(record, key) for key in keys}


def decode(raw: bytes) -> str:
    """Return bytes as text.

    Raises:
        RecordError: if they are no UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RecordError(
            "not UTF-8", f"not UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    if key not in record:
        has = ", ".join(map(repr, list(record)[:8])) or "none"
        raise RecordError("key missing", f"no key {key!r} (it has: {has})")
    value = record[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise RecordError("not text", f"key {key!r} holds {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                "lone surrogate",
                f"key {key!r} holds a lone surrogate (half of a UTF-16 pair), "
                f"U+{ord(text[error.start]):04X} at character {error.start}",
            ) from error
    return texts


def _without_mark(block: Block) -> bytes:
    return block.data.removeprefix(_BYTE_ORDER_MARK) if block.first_line == 1 else block.data


def _units(data: bytes, first_line: int, unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Yield the documents of plain text, each with the number of the line it starts on."""
    match unit:
        case "file":
            yield first_line, data
        case "line":
            yield from enumerate(data.split(b"\n"), first_line)
        case "paragraph":
            # Cut before each run of blank lines, so that the line ends of all parts add up.
            starts = [0, *(match.start() for match in _PARAGRAPHS.finditer(data)), len(data)]
            line = first_line
            for start, end in itertools.pairwise(starts):
                part = data[start:end]
                blank = part[: len(part) - len(part.lstrip())]
                yield line + blank.count(b"\n"), part
                line += part.count(b"\n")
