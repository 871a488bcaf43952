"""Pass documents of loose JSON through a function, in order, and count what becomes of them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from megatree.io.data.atomic import atomic_write
from megatree.io.preprocess.blocks import MAX_LINE_BYTES, BadLine, Block, read_blocks, too_long
from megatree.io.preprocess.compressed import compressed_writer
from megatree.io.preprocess.parallel import ordered_map
from megatree.io.preprocess.records import RecordError, numbered_lines, parse_line, texts_of

Record = dict[str, Any]
OnBadLine = Literal["stop", "skip"]
R = TypeVar("R")

BAD_LINE = "bad line: "


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A document that does not stay, and why: the name to count it by."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A document that stays.

    Attributes:
        records: what it became, one document or several; None leaves the line as it was.
        notes: names of what was done to it, to count by.
    """

    records: tuple[Record, ...] | None = None
    notes: tuple[str, ...] = ()


Verdict = Kept | Dropped
# The record, its text, and the line it stands on.
Judge = Callable[[Record, str, int], Verdict]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What became of the documents.

    Law: documents + sum(dropped) = lines read that are not blank.

    Attributes:
        documents: that stayed.
        written: documents written: more where one was cut into several.
        dropped: reason -> how many.
        notes: what was done to those that stayed -> how many.
        bytes_read: uncompressed.
        bytes_written: uncompressed.
    """

    documents: int = 0
    written: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0

    def plus(self, other: "Tally") -> "Tally":
        """Return the counts of both."""
        return Tally(
            documents=self.documents + other.documents,
            written=self.written + other.written,
            dropped=_sum(self.dropped, other.dropped),
            notes=_sum(self.notes, other.notes),
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where documents come from and go to.

    Attributes:
        inputs: loose JSON, compressed or not.
        output: loose JSON, compressed as its suffix says; it appears when it is whole.
        key: of the text.
        workers: processes.
        on_bad_line: stop at a line that gives no document, or count it and go on.
        max_line_bytes: the longest line that is accepted.
        overwrite: replace a file of the output's name.
        report: called after each block with the counts so far.
    """

    inputs: tuple[Path, ...]
    output: Path
    key: str = "text"
    workers: int = 1
    on_bad_line: OnBadLine = "stop"
    max_line_bytes: int = MAX_LINE_BYTES
    overwrite: bool = False
    report: Callable[[Tally], None] = lambda tally: None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs: 0 files hold no documents. Name at least one.")
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError(
                f"inputs: {len(self.inputs)} files, {len(set(self.inputs))} of them different. "
                "Name each once."
            )
        if self.output.exists() and not self.overwrite:
            raise ValueError(
                f"{self.output}: already there. Name another output, or pass --overwrite."
            )
        if any(path.resolve() == self.output.resolve() for path in self.inputs):
            raise ValueError(f"{self.output}: it is an input too. Name another output.")


def filter_documents(
    job: Job, judge: Judge, *, drop_lines: Callable[[str, int, int], frozenset[int]] | None = None
) -> Tally:
    """Write the documents that `judge` keeps, in order; a kept line keeps its bytes.

    Args:
        job: the files.
        judge: picklable: its answer depends on its arguments alone.
        drop_lines: (file, first line, last line) -> lines among them that go before `judge` sees
            them, as duplicates.

    Raises:
        ValueError: if an input cannot be read, or a line is bad and the job stops at those.
    """
    tally = Tally()
    work = partial(_filter_block, judge, job.key, job.max_line_bytes)
    with open_output(job.output, overwrite=job.overwrite) as stream:
        items = _with_lines(job_blocks(job), drop_lines)
        for data, some, bad in ordered_map(work, items, workers=job.workers):
            refuse_bad(bad, job.on_bad_line)
            stream.write(data)
            tally = tally.plus(some)
            job.report(tally)
    return tally


def map_documents(
    job: Job, work: Callable[[Block | BadLine], tuple[R, list[BadLine]]]
) -> Iterator[R]:
    """Yield what `work` makes of each block of the inputs, in order.

    Raises:
        ValueError: as `filter_documents`.
    """
    for result, bad in ordered_map(work, job_blocks(job), workers=job.workers):
        refuse_bad(bad, job.on_bad_line)
        yield result


def documents_of(
    block: Block | BadLine, key: str, max_line_bytes: int
) -> Iterator[tuple[int, bytes, Record, str] | BadLine]:
    """Yield (line, its bytes, the record, its text) of each line of a block."""
    if isinstance(block, BadLine):
        yield block
        return
    for line, raw in numbered_lines(block):
        if len(raw) > max_line_bytes:
            yield too_long(block.file, line, len(raw), max_line_bytes)
            continue
        try:
            record = parse_line(raw)
            yield line, raw, record, "\n".join(texts_of(record, [key])[key])
        except RecordError as bad:
            yield BadLine(file=block.file, line=line, kind=bad.kind, detail=bad.detail)


def job_blocks(job: Job) -> Iterator[Block | BadLine]:
    """Yield the blocks of all inputs of a job."""
    for path in job.inputs:
        yield from read_blocks(path, max_line_bytes=job.max_line_bytes)


def refuse_bad(bad: Sequence[BadLine], on_bad_line: OnBadLine) -> None:
    """Raise at the first of some bad lines, unless they are to be skipped.

    Raises:
        ValueError: naming the file and the line.
    """
    if bad and on_bad_line == "stop":
        raise ValueError(
            f"{bad[0]}. Mend the line, or pass --on-bad-line skip to leave such lines out and "
            "count them."
        )


@contextmanager
def open_output(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Give a stream to a file that appears when the block ends; it is compressed by its suffix.

    Raises:
        ValueError: if the file is there by then, and may not be replaced.
    """
    with atomic_write(path) as staged:
        with compressed_writer(path, staged.file) as stream:
            yield stream
        if path.exists() and not overwrite:
            raise ValueError(f"{path}: another process made it. Name another output.")


def json_line(record: Record) -> bytes:
    """Return a record as a line of loose JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _with_lines(
    blocks: Iterable[Block | BadLine],
    drop_lines: Callable[[str, int, int], frozenset[int]] | None,
) -> Iterator[tuple[Block | BadLine, frozenset[int]]]:
    for block in blocks:
        if drop_lines is None or isinstance(block, BadLine):
            yield block, frozenset()
        else:
            last = block.first_line + block.data.count(b"\n")
            yield block, drop_lines(block.file, block.first_line, last)


def _filter_block(
    judge: Judge, key: str, max_line_bytes: int, item: tuple[Block | BadLine, frozenset[int]]
) -> tuple[bytes, Tally, list[BadLine]]:
    block, gone = item
    out: list[bytes] = []
    bad: list[BadLine] = []
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    documents = 0
    for one in documents_of(block, key, max_line_bytes):
        if isinstance(one, BadLine):
            bad.append(one)
            dropped[BAD_LINE + one.kind] += 1
            continue
        line, raw, record, text = one
        verdict = Dropped(reason="duplicate") if line in gone else judge(record, text, line)
        if isinstance(verdict, Dropped):
            dropped[verdict.reason] += 1
            continue
        documents += 1
        notes.update(verdict.notes)
        made = verdict.records
        out += [raw + b"\n"] if made is None else [json_line(one) for one in made]
    data = b"".join(out)
    tally = Tally(
        documents=documents,
        written=len(out),
        dropped=dict(dropped),
        notes=dict(notes),
        bytes_read=len(block.data) if isinstance(block, Block) else 0,
        bytes_written=len(data),
    )
    return data, tally, bad


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted(a.keys() | b.keys())}
