"""A stream of bytes as blocks of whole lines, in memory bounded by the longest line allowed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatree.io.preprocess.compressed import Source, open_source

BLOCK_BYTES = 1 << 20
# The tokenizers library takes 130 bytes of memory per byte of a text (measured on 9 MB, GPT-2): a
# line of this size takes 2 GB in each worker.
MAX_LINE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that gives no document, and why.

    Attributes:
        file: where it stands.
        line: its number, from 1; in parquet the row.
        kind: short name of the reason, to count by.
        detail: the reason in words.
    """

    file: str
    line: int
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some whole lines (or documents of plain text) of a file.

    Attributes:
        file: where they stand.
        first_line: number of the first one, from 1.
        data: the bytes of the lines.
        position: bytes of the file on disk read so far.
    """

    file: str
    first_line: int
    data: bytes
    position: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a table.

    Attributes:
        file: where they stand.
        first_row: number of the first one, from 1.
        rows: column -> value, of each.
        position: bytes of the file on disk read so far.
    """

    file: str
    first_row: int
    rows: tuple[dict[str, Any], ...]
    position: int


Unit = Literal["line", "paragraph", "file"]

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def read_blocks(
    path: Path,
    *,
    unit: Unit = "line",
    block_bytes: int = BLOCK_BYTES,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Block | BadLine]:
    """Yield a file as blocks of about `block_bytes`, in order.

    What is longer than `max_line_bytes` is never held: it is read past and yielded as a BadLine.

    Args:
        path: the file, compressed or not.
        unit: what a block never cuts: a line, a paragraph (blank lines part them), the file.
        block_bytes: bytes to read at once.
        max_line_bytes: the longest line (or document of plain text) that is accepted.

    Raises:
        ValueError: if the file cannot be read to its end.
    """
    block_bytes = min(block_bytes, max_line_bytes)
    with open_source(path) as source:
        line = 1
        held = bytearray()
        while chunk := source.read(block_bytes):
            held += chunk
            end = _last_end(held, unit)
            if end:
                data = bytes(memoryview(held)[:end])
                del held[:end]
                yield Block(file=str(path), first_line=line, data=data, position=source.position)
                line += data.count(b"\n")
            if len(held) > max_line_bytes:
                length, lines, held = _skip(source, held, unit, block_bytes)
                yield too_long(str(path), line, length, max_line_bytes)
                line += lines
        if held:
            yield Block(file=str(path), first_line=line, data=bytes(held), position=source.position)


def too_long(file: str, line: int, num_bytes: int, max_line_bytes: int) -> BadLine:
    """Return the report of a line that is too long."""
    return BadLine(
        file=file,
        line=line,
        kind="too long",
        detail=f"{num_bytes} bytes, more than the {max_line_bytes} of max_line_bytes",
    )


def _skip(
    source: Source, held: bytearray, unit: Unit, block_bytes: int
) -> tuple[int, int, bytearray]:
    """Read past the end of what is too long; return its bytes, its line ends, what follows."""
    length, lines = len(held), held.count(b"\n")
    tail = held[-2:]
    while chunk := source.read(block_bytes):
        held = tail + chunk
        end = _first_end(held, unit)
        if end:
            length += end - len(tail)
            lines += held[len(tail) : end].count(b"\n")
            return length, lines, held[end:]
        length += len(chunk)
        lines += chunk.count(b"\n")
        tail = held[-2:]
    return length, lines, bytearray()


def _last_end(data: bytearray, unit: Unit) -> int:
    """Return where the last whole unit ends, or 0."""
    match unit:
        case "line":
            return data.rfind(b"\n") + 1
        case "paragraph":
            # Blank lines of more than a space part paragraphs too, but no blocks.
            ends = (b"\n\n", b"\n\r\n", b"\n \n")
            return max(at + len(end) if (at := data.rfind(end)) >= 0 else 0 for end in ends)
        case "file":
            return 0


def _first_end(data: bytearray, unit: Unit) -> int:
    """Return where the first unit ends, or 0."""
    match unit:
        case "line":
            return data.find(b"\n") + 1
        case "paragraph":
            found = _BLANK_LINE.search(data)
            return found.end() if found else 0
        case "file":
            return 0
