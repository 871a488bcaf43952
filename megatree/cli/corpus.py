"""`megatree corpus`: make a corpus of loose JSON cleaner, step by step."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from megatree.cli.choose import choose
from megatree.cli.corpus_options import (
    Clean,
    Decontaminate,
    DropGroups,
    Exact,
    Files,
    Groups,
    Near,
    Pairs,
    Urls,
    Wikipedia,
)

if TYPE_CHECKING:
    from megatree.io.corpus.stream import Job, Tally
    from megatree.io.preprocess.meter import Meter

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


def wikipedia(options: Wikipedia) -> None:
    """Extract articles."""
    from megatree.io.corpus.wikipedia import Articles, extract_wikipedia
    from megatree.io.preprocess.meter import Meter

    articles = Articles(namespaces=options.namespaces, min_characters=options.min_characters)
    with Meter("wikipedia") as meter:
        tally = extract_wikipedia(
            options.dumps,
            options.output,
            articles=articles,
            workers=options.workers,
            overwrite=options.overwrite,
            report=_reporter(meter),
        )
    _tell(tally, options.output, options.counts)


def urls(options: Urls) -> None:
    """Filter lists of addresses."""
    from megatree.io.corpus.urls import BlockList, filter_urls
    from megatree.io.preprocess.meter import Meter

    with Meter("urls") as meter:
        tally = filter_urls(
            options.inputs,
            options.output,
            BlockList.read(options.block_list),
            overwrite=options.overwrite,
            report=_reporter(meter),
        )
    _tell(tally, options.output, options.counts)


def clean(options: Clean) -> None:
    """Mend and sift documents."""
    from megatree.cli.data import named_tokenizer
    from megatree.io.corpus.cleanup import Cleanup
    from megatree.io.corpus.cleanup import clean as run
    from megatree.io.corpus.urls import BlockList

    rules = Cleanup(
        blocked=BlockList.read(options.block_list),
        url_key=options.url_key,
        fix_text=not options.keep_broken_text,
        languages=options.languages,
        min_characters=options.min_characters,
        max_characters=options.max_characters,
        min_tokens=options.min_tokens,
        tokenizer=named_tokenizer(options.tokenizer, {}),
    )
    _run("clean", options, lambda job: run(job, rules))


def exact_duplicates(options: Exact) -> None:
    """Drop repeated texts."""
    from megatree.io.corpus.exact import drop_exact_duplicates

    _run(
        "exact-duplicates",
        options,
        lambda job: drop_exact_duplicates(job, normalize=options.normalize),
    )


def near_duplicates(options: Near) -> None:
    """Find, group and drop what is nearly the same."""
    from megatree.io.corpus.groups import drop_groups, group_pairs

    pairs = options.pairs or options.output.with_name(f"{options.output.name}.pairs.jsonl")
    groups = options.groups or options.output.with_name(f"{options.output.name}.groups.jsonl")
    _job(options)  # refuses what cannot be written before any work
    _find(options, pairs)
    number = group_pairs(pairs, groups, threshold=options.threshold, overwrite=options.overwrite)
    print(f"{number:,} groups: {groups}")
    _run("near-duplicates", options, lambda job: drop_groups(job, groups))


def find_pairs(options: Pairs) -> None:
    """Find pairs that are nearly the same."""
    _find(options, options.output)


def groups(options: Groups) -> None:
    """Connect pairs into groups."""
    from megatree.io.corpus.groups import group_pairs

    number = group_pairs(
        options.pairs, options.output, threshold=options.threshold, overwrite=options.overwrite
    )
    print(f"{number:,} groups: {options.output}")


def drop_groups(options: DropGroups) -> None:
    """Drop all but the first document of each group."""
    from megatree.io.corpus.groups import drop_groups as run

    _run("drop-groups", options, lambda job: run(job, options.groups))


def decontaminate(options: Decontaminate) -> None:
    """Cut out what evaluation sets hold."""
    from megatree.io.corpus.decontaminate import Decontamination
    from megatree.io.corpus.decontaminate import decontaminate as run
    from megatree.io.corpus.evaluation import Evaluations

    evaluations = Evaluations.read(
        options.against,
        options.against_keys,
        num_words=options.num_words,
        min_words=options.min_words,
    )
    print(
        f"{len(evaluations.grams):,} word sequences of {evaluations.texts:,} evaluation texts "
        f"({evaluations.too_short:,} more are too short)"
    )
    rules = Decontamination(
        margin=options.margin,
        min_piece=options.min_piece,
        max_cuts=options.max_cuts,
        max_occurrences=None if options.max_occurrences < 0 else options.max_occurrences,
    )
    _run("decontaminate", options, lambda job: run(job, evaluations, rules))


def _job(options: Files, output: Path | None = None, meter: "Meter | None" = None) -> "Job":
    from megatree.io.corpus.stream import Job

    return Job(
        inputs=options.inputs,
        output=output or options.output,
        key=options.json_key,
        workers=options.workers,
        on_bad_line=options.on_bad_line,
        max_line_bytes=options.max_line_bytes,
        overwrite=options.overwrite,
        report=_reporter(meter) if meter else lambda tally: None,
    )


def _run(label: str, options: Files, work: "Callable[[Job], Tally]") -> None:
    from megatree.io.preprocess.meter import Meter

    with Meter(label) as meter:
        tally = work(_job(options, meter=meter))
    _tell(tally, options.output, options.counts)


def _find(options: Near | Pairs, output: Path) -> None:
    from megatree.io.corpus.near import NearDuplicates
    from megatree.io.corpus.near import find_pairs as run
    from megatree.io.preprocess.meter import Meter

    rules = NearDuplicates(
        threshold=options.threshold, measure=options.measure, num_places=options.num_places
    )
    with Meter("find-pairs") as meter:
        found = run(_job(options, output, meter), rules)
    print(
        f"{found.pairs:,} pairs of {found.documents:,} documents ({found.empty:,} empty); "
        f"{found.compared:,} compared: {output}"
    )
    if found.not_compared:
        print(
            f"{found.not_compared:,} documents of very large buckets were not compared with all "
            "others; raise --threshold, or drop exact duplicates first"
        )


def _reporter(meter: "Meter") -> "Callable[[Tally], None]":
    def report(tally: "Tally") -> None:
        read = tally.documents + sum(tally.dropped.values())
        meter.show(read, tally.bytes_read)

    return report


def _tell(tally: "Tally", output: Path, counts: Path | None) -> None:
    if counts is not None:
        counts.write_text(json.dumps(tally.to_json(), indent=1) + "\n")
    table = Table(title=str(output), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    read = tally.documents + sum(tally.dropped.values())
    table.add_row("documents read", f"{read:,}")
    for reason, number in sorted(tally.dropped.items(), key=lambda item: -item[1]):
        table.add_row(f"  dropped: {reason}", f"{number:,}")
    table.add_row("documents kept", f"{tally.documents:,}")
    for note, number in sorted(tally.notes.items()):
        table.add_row(f"  of them: {note}", f"{number:,}")
    table.add_row("documents written", f"{tally.written:,}")
    table.add_row(
        "MB read, written", f"{tally.bytes_read / 1e6:,.1f}, {tally.bytes_written / 1e6:,.1f}"
    )
    Console(highlight=False, soft_wrap=True).print(table)


ABOUT = "Make a corpus of loose JSON cleaner; every step counts what it drops and why."
COMMANDS: Mapping[str, tuple[str, type, Callable]] = {
    "wikipedia": ("Articles of a MediaWiki XML dump as running text.", Wikipedia, wikipedia),
    "urls": ("Filter lists of web addresses.", Urls, urls),
    "clean": ("Filter by address, language, length; mend broken characters.", Clean, clean),
    "exact-duplicates": ("Keep the first of equal texts.", Exact, exact_duplicates),
    "near-duplicates": ("Keep the first of nearly equal texts.", Near, near_duplicates),
    "find-pairs": ("Only find pairs of nearly equal texts.", Pairs, find_pairs),
    "group-pairs": ("Connect pairs into groups.", Groups, groups),
    "drop-groups": ("Drop all but the first of each group.", DropGroups, drop_groups),
    "decontaminate": ("Cut out what evaluation sets hold.", Decontaminate, decontaminate),
}


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    described = {name: text for name, (text, _, _) in COMMANDS.items()}
    name = choose("megatree corpus", args, described, kind="command", about=ABOUT)
    text, options, command = COMMANDS[name]
    prog = f"megatree corpus {name}"
    command(tyro.cli(options, prog=prog, description=text, args=args[1:], config=_CONFIG))
    return 0
