"""Text files to `.bin/.idx` pairs: one pair per key, input by input, resumable, never half done."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatree.io.data.index_format import token_dtype
from megatree.io.preprocess.counts import Counts, Progress, Tracker
from megatree.io.preprocess.encode import Format, Recipe, encode_block, load_once
from megatree.io.preprocess.input_file import InputFile
from megatree.io.preprocess.inputs import format_of, input_blocks
from megatree.io.preprocess.parallel import ordered_map
from megatree.io.preprocess.part import Part
from megatree.io.preprocess.writers import PairWriters
from megatree.io.tokenizers import Tokenizer, read_beside, tokenizer_facts, write_beside

OnBadLine = Literal["stop", "skip"]


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
        sources=[InputFile.of(path, one) for path, one in zip(inputs, forms, strict=True)],
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    recipe: Recipe
    tokenizer: Tokenizer
    prefix: str
    sources: list[InputFile]
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
        whole = all(
            Path(f"{prefix}{suffix}").exists()
            for prefix in self.outputs.values()
            for suffix in (".bin", ".idx")
        )
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
                counts = self._encode(
                    self.sources[0],
                    writers,
                    Tracker(self.report, sum(source.size for source in self.sources)),
                )
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

    def _writers(self) -> PairWriters:
        return PairWriters(self.outputs, self._dtype, self.bad_lines, overwrite=self.overwrite)

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

    def _finish(self, writers: PairWriters, counts: Counts) -> None:
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

    def _encode_parts(self) -> tuple[list[Part], int]:
        """Return the parts of all inputs, encoding those that an earlier run left out."""
        tracker = Tracker(self.report, sum(source.size for source in self.sources))
        self.parts.mkdir(parents=True, exist_ok=True)
        parts, reused = [], 0
        for number, source in enumerate(self.sources):
            told = json.dumps([self.facts(), source.facts()], sort_keys=True)
            digest = hashlib.sha256(told.encode()).hexdigest()[:16]
            part = Part(folder=self.parts, stem=f"{number:05d}-{digest}", keys=self.recipe.keys)
            counts = part.read_counts()
            if counts is None:
                with PairWriters(part.prefixes, self._dtype, part.bad, overwrite=True) as writers:
                    counts = self._encode(source, writers, tracker)
                part.mark_whole(counts)
            else:
                reused += 1
            tracker.next_input(counts, source.size)
            parts.append(part)
        return parts, reused

    def _encode(self, source: InputFile, writers: PairWriters, tracker: Tracker) -> Counts:
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
            tracker.show(counts, encoded.position)
        source.require_unchanged()
        return counts
