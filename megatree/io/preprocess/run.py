"""Text files to `.bin/.idx` pairs: one pair per key, input by input, resumable, never half done."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatree.io.data.atomic import StagedFile, atomic_write
from megatree.io.data.index_format import token_dtype
from megatree.io.data.indexed import IndexedFile, IndexedWriter
from megatree.io.preprocess.blocks import BadLine
from megatree.io.preprocess.encode import Encoded, Format, Recipe, encode_block, load_once
from megatree.io.preprocess.inputs import format_of, input_blocks
from megatree.io.preprocess.parallel import ordered_map
from megatree.io.tokenizers import Tokenizer, read_beside, tokenizer_facts, write_beside

OnBadLine = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What came out of some input.

    Attributes:
        documents: written, per key.
        num_bytes: read, uncompressed.
        bad: lines without a document, by reason.
    """

    documents: int = 0
    num_bytes: int = 0
    bad: Mapping[str, int]

    def plus(self, other: "Counts") -> "Counts":
        """Return the counts of both."""
        return Counts(
            documents=self.documents + other.documents,
            num_bytes=self.num_bytes + other.num_bytes,
            bad=dict(Counter(self.bad) + Counter(other.bad)),
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is.

    Attributes:
        counts: of all inputs so far.
        position: bytes of files on disk read so far.
        size: bytes of files on disk in all.
    """

    counts: Counts
    position: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a job wrote.

    Attributes:
        prefixes: of the pairs, by key.
        counts: of all inputs.
        bad_lines: file that names the lines without a document; None if there are none.
        reused: inputs (or, for a finished job, all) whose work an earlier run had done.
    """

    prefixes: Mapping[str, str]
    counts: Counts
    bad_lines: Path | None
    reused: int


def preprocess(
    inputs: Sequence[Path],
    output_prefix: str,
    recipe: Recipe,
    *,
    form: Format | None = None,
    workers: int = 1,
    on_bad_line: OnBadLine = "stop",
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Write `{output_prefix}_{key}_{document|sentence}.bin/.idx` for each key of the recipe.

    Documents stand in the order of the inputs and of their lines, whatever `workers` is: the bytes
    of the pairs depend on the inputs and the recipe alone. A pair takes its name when it is whole;
    until then each of several inputs is kept under `{output_prefix}.parts`, and a later run with
    the same inputs and recipe starts with the first input that is missing there.

    Args:
        inputs: files.
        output_prefix: path that the names start with.
        recipe: what decides the ids.
        form: of the inputs; None goes by their suffixes.
        workers: processes that encode.
        on_bad_line: stop at the first line without a document, or name it in
            `{output_prefix}.bad.jsonl` and go on.
        overwrite: replace pairs of other inputs or another recipe.
        report: called after each block.

    Raises:
        ValueError: if an input cannot be read, a line is bad, or the pairs exist.
        ChildProcessError: if a worker dies.
    """
    if not inputs:
        raise ValueError("preprocess: 0 inputs give no pair. Name at least one file.")
    forms = [format_of(path, form) for path in inputs]
    if "text" in forms and len(recipe.keys) > 1:
        raise ValueError(
            f"json-keys: plain text has no keys, and {len(recipe.keys)} are named. Name one."
        )
    tokenizer = load_once(recipe)
    job = _Job(
        recipe=recipe,
        tokenizer=tokenizer,
        prefix=output_prefix,
        sources=[_Source.of(path, one) for path, one in zip(inputs, forms, strict=True)],
        workers=workers,
        on_bad_line=on_bad_line,
        overwrite=overwrite,
        report=report,
    )
    done = job.finished()
    if done is not None:
        return done
    job.refuse_existing()
    return job.run()


@dataclass(frozen=True, kw_only=True)
class _Source:
    """An input as it was when the job began."""

    path: Path
    form: Format
    size: int
    mtime_ns: int

    @staticmethod
    def of(path: Path, form: Format) -> "_Source":
        try:
            info = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}. Name files that exist.") from error
        return _Source(path=path, form=form, size=info.st_size, mtime_ns=info.st_mtime_ns)

    def facts(self) -> dict[str, Any]:
        told = {"path": str(self.path.resolve()), "form": self.form}
        return {**told, "size": self.size, "mtime_ns": self.mtime_ns}

    def require_unchanged(self) -> None:
        if _Source.of(self.path, self.form) != self:
            raise ValueError(
                f"{self.path}: it changed while it was read. Run again when nothing writes to it."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    recipe: Recipe
    tokenizer: Tokenizer
    prefix: str
    sources: list[_Source]
    workers: int
    on_bad_line: OnBadLine
    overwrite: bool
    report: Callable[[Progress], None]

    @property
    def level(self) -> str:
        return "document" if self.recipe.splitter is None else "sentence"

    @property
    def outputs(self) -> dict[str, str]:
        return {key: f"{self.prefix}_{key}_{self.level}" for key in self.recipe.keys}

    @property
    def bad_lines(self) -> Path:
        return Path(f"{self.prefix}.bad.jsonl")

    @property
    def parts(self) -> Path:
        return Path(f"{self.prefix}.parts")

    def facts(self) -> dict[str, Any]:
        """All that decides the bytes of the pairs, as far as it can be told without reading."""
        recipe = {**asdict(self.recipe), "tokenizer": self.tokenizer.identity}
        told = {"recipe": recipe, "on_bad_line": self.on_bad_line}
        return json.loads(json.dumps(told, default=str))

    def finished(self) -> Summary | None:
        """Return what an earlier run of the same job wrote."""
        told = [read_beside(prefix) for prefix in self.outputs.values()]
        inputs = [source.facts() for source in self.sources]
        whole = all(Path(f"{prefix}.idx").exists() for prefix in self.outputs.values())
        same = all(
            facts is not None and facts.get("job") == self.facts() and facts["inputs"] == inputs
            for facts in told
        )
        if not (whole and same and told[0]):
            return None
        shutil.rmtree(self.parts, ignore_errors=True)  # killed between the pairs and this
        counts = Counts(**told[0]["counts"])
        return self._summary(counts, reused=len(self.sources))

    def refuse_existing(self) -> None:
        found = [
            f"{prefix}{suffix}"
            for prefix in self.outputs.values()
            for suffix in (".bin", ".idx")
            if Path(f"{prefix}{suffix}").exists()
        ]
        if found and not self.overwrite:
            raise ValueError(
                f"{', '.join(found)}: already there, made from other inputs or settings. "
                "Choose another output prefix, remove them, or pass --overwrite."
            )

    def run(self) -> Summary:
        if len(self.sources) == 1:
            with self._writers() as writers:
                counts = self._encode(self.sources[0], writers, _Meter(self.report, self.sources))
                self._finish(writers, counts)
            return self._summary(counts, reused=0)
        parts, reused = self._encode_parts()
        counts = Counts(bad={})
        with self._writers() as writers:
            for part in parts:
                counts = counts.plus(part.append_to(writers))
            self._finish(writers, counts)
        for part in parts:
            part.unmark()
        shutil.rmtree(self.parts)
        return self._summary(counts, reused=reused)

    def _writers(self) -> "_Writers":
        return _Writers(self.outputs, self._dtype, self.bad_lines, overwrite=self.overwrite)

    @property
    def _dtype(self) -> Any:
        return token_dtype(self.tokenizer.vocab_size)

    def _summary(self, counts: Counts, *, reused: int) -> Summary:
        return Summary(
            prefixes=self.outputs,
            counts=counts,
            bad_lines=self.bad_lines if counts.bad else None,
            reused=reused,
        )

    def _finish(self, writers: "_Writers", counts: Counts) -> None:
        """Store the facts; the pairs take their names when the writers close, right after."""
        for key, prefix in self.outputs.items():
            if self.overwrite:  # new facts must never stand beside an old pair
                Path(f"{prefix}.idx").unlink(missing_ok=True)
            write_beside(
                prefix,
                {
                    "tokenizer": tokenizer_facts(self.tokenizer, self.recipe.tokenizer),
                    "key": key,
                    "level": self.level,
                    "append_eod": self.recipe.append_eod,
                    "counts": asdict(counts),
                    "job": self.facts(),
                    "inputs": [source.facts() for source in self.sources],
                },
            )

    def _encode_parts(self) -> tuple[list["_Part"], int]:
        """Return the parts of all inputs, encoding those that an earlier run left out."""
        meter = _Meter(self.report, self.sources)
        self.parts.mkdir(parents=True, exist_ok=True)
        parts, reused = [], 0
        for number, source in enumerate(self.sources):
            told = json.dumps([self.facts(), source.facts()], sort_keys=True)
            digest = hashlib.sha256(told.encode()).hexdigest()[:16]
            part = _Part(folder=self.parts, stem=f"{number:05d}-{digest}", keys=self.recipe.keys)
            counts = part.read_counts()
            if counts is None:
                with _Writers(part.prefixes, self._dtype, part.bad, overwrite=True) as writers:
                    counts = self._encode(source, writers, meter)
                part.mark_whole(counts)
            else:
                reused += 1
            meter.next_input(counts, source)
            parts.append(part)
        return parts, reused

    def _encode(self, source: _Source, writers: "_Writers", meter: "_Meter") -> Counts:
        counts = Counts(bad={})
        work = partial(encode_block, self.recipe, source.form)
        blocks = input_blocks(source.path, source.form, self.recipe)
        for encoded in ordered_map(work, blocks, workers=self.workers):
            if encoded.bad and self.on_bad_line == "stop":
                raise ValueError(
                    f"{encoded.bad[0]}. Mend the line, or pass --on-bad-line skip to leave such "
                    "lines out and list them."
                )
            # At each block: a file that grows as fast as it is read would never end.
            source.require_unchanged()
            writers.add(encoded)
            bad = Counter(one.kind for one in encoded.bad)
            some = Counts(
                documents=encoded.num_documents, num_bytes=encoded.num_bytes, bad=dict(bad)
            )
            counts = counts.plus(some)
            meter.show(counts, encoded.position)
        source.require_unchanged()
        return counts


class _Writers:
    """The pairs of all keys, and the list of bad lines; all appear when the block ends."""

    def __init__(
        self, prefixes: Mapping[str, str], dtype: Any, bad: Path, *, overwrite: bool
    ) -> None:
        self._bad_path = bad
        self._bad: StagedFile | None = None
        with ExitStack() as stack:
            self.by_key = {
                key: stack.enter_context(IndexedWriter(prefix, dtype, overwrite=overwrite))
                for key, prefix in prefixes.items()
            }
            stack.push(self._close_bad)
            self._stack = stack.pop_all()

    def __enter__(self) -> "_Writers":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def _close_bad(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Runs before the pairs are closed: what it raises leaves no pair."""
        if self._bad is not None:
            (self._bad.discard if kind else self._bad.commit)()
        elif kind is None:
            self._bad_path.unlink(missing_ok=True)

    def add(self, encoded: Encoded) -> None:
        for key, column in encoded.columns.items():
            self.by_key[key].add_documents(column.tokens, column.lengths, column.sequences)
        for one in encoded.bad:
            self.add_bad(json.dumps(asdict(one), ensure_ascii=True).encode() + b"\n")

    def add_bad(self, lines: bytes) -> None:
        if self._bad is None:
            self._bad = StagedFile(self._bad_path)
        self._bad.write(lines)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One encoded input of several; whole once its marker is there."""

    folder: Path
    stem: str
    keys: tuple[str, ...]

    @property
    def prefixes(self) -> dict[str, str]:
        return {key: str(self.folder / f"{self.stem}_{key}") for key in self.keys}

    @property
    def bad(self) -> Path:
        return self.folder / f"{self.stem}.bad.jsonl"

    @property
    def _marker(self) -> Path:
        return self.folder / f"{self.stem}.whole.json"

    def read_counts(self) -> Counts | None:
        if not self._marker.exists():
            return None
        return Counts(**json.loads(self._marker.read_text(encoding="utf-8")))

    def mark_whole(self, counts: Counts) -> None:
        with atomic_write(self._marker) as file:
            file.write(json.dumps(asdict(counts)).encode())

    def unmark(self) -> None:
        """Make it not whole: before its files go, one by one."""
        self._marker.unlink(missing_ok=True)

    def append_to(self, writers: _Writers) -> Counts:
        for key, prefix in self.prefixes.items():
            writers.by_key[key].add_file(IndexedFile(prefix))
        if self.bad.exists():
            with open(self.bad, "rb") as file:
                while lines := file.read(1 << 20):
                    writers.add_bad(lines)
        counts = self.read_counts()
        assert counts is not None, "a part is appended when it is whole"
        return counts


class _Meter:
    """Adds up what is reported over the inputs."""

    def __init__(self, report: Callable[[Progress], None], sources: Sequence[_Source]) -> None:
        self._report = report
        self._before = Counts(bad={})
        self._position = 0
        self._shown = 0
        self._size = sum(source.size for source in sources)

    def show(self, counts: Counts, position: int) -> None:
        self._shown = max(self._shown, self._position + position)
        counts = self._before.plus(counts)
        self._report(Progress(counts=counts, position=self._shown, size=self._size))

    def next_input(self, counts: Counts, source: _Source) -> None:
        self._before = self._before.plus(counts)
        self._position += source.size
        self.show(Counts(bad={}), 0)


def bad_lines_of(path: Path) -> Iterator[BadLine]:
    """Yield the lines that a job listed."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield BadLine(**json.loads(line))
