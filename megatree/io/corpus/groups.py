"""From pairs of documents to groups, and a corpus with the first of each group only."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatree.io.corpus.places import PlacesBuilder
from megatree.io.corpus.stream import Job, Kept, Record, Tally, filter_documents, open_output
from megatree.io.corpus.union import UnionFind
from megatree.io.preprocess.blocks import BadLine, read_blocks
from megatree.io.preprocess.records import numbered_lines, parse_line


def group_pairs(pairs: Path, output: Path, *, threshold: float, overwrite: bool = False) -> int:
    """Write groups of documents that pairs connect, a JSON object a line; return their number.

    In a group each document is connected to each by pairs at or above the threshold. `keep` is the
    first of them in the order of files and lines, `drop` the others.

    Args:
        pairs: from `find_pairs`.
        output: appears when it is whole.
        threshold: at least the one that the pairs were found with; below it they are incomplete.
        overwrite: replace a file of that name.

    Raises:
        ValueError: if the pairs cannot be read, or the output exists.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: already there. Name another output, or pass --overwrite.")
    joined: UnionFind[tuple[str, int]] = UnionFind()
    order: dict[str, int] = {}
    for place, record in _records(pairs, "similarity", "a", "b", "order"):
        for name, at in zip((record["a"][0], record["b"][0]), record["order"], strict=True):
            order[name] = at
        if record["similarity"] >= threshold:
            joined.join(_place(place, record["a"]), _place(place, record["b"]))
    groups = [
        sorted(group, key=lambda document: (order[document[0]], document[1]))
        for group in joined.groups()
    ]
    groups.sort(key=lambda group: (order[group[0][0]], group[0][1]))
    with open_output(output, overwrite=overwrite) as stream:
        for first, *others in groups:
            line = json.dumps({"keep": first, "drop": others}, ensure_ascii=False)
            stream.write(line.encode() + b"\n")
    return len(groups)


def drop_groups(job: Job, groups: Path) -> Tally:
    """Write the documents of a job less those that groups drop.

    Raises:
        ValueError: if the groups name a file that is no input, or an input cannot be read.
    """
    builder = PlacesBuilder(job.inputs)
    lines: dict[str, list[int]] = defaultdict(list)
    for place, record in _records(groups, "keep", "drop"):
        for document in record["drop"]:
            file, line = _place(place, document)
            lines[file].append(line)
    for path in job.inputs:
        builder.add(str(path), sorted(lines.pop(str(path), [])))
    if lines:
        raise ValueError(
            f"{groups}: it names {next(iter(lines))}, which is no input. "
            "Name the same files, spelled the same way, as when the pairs were found."
        )
    return filter_documents(job, _keep, drop_lines=builder.build().between)


def _records(path: Path, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for block in read_blocks(path):
        if isinstance(block, BadLine):
            raise ValueError(f"{block}. Make the file again.")
        for line, raw in numbered_lines(block):
            record = parse_line(raw)
            missing = [key for key in keys if key not in record]
            if missing:
                raise ValueError(
                    f"{path}:{line}: no {', '.join(missing)}. Give the file that the step before "
                    "wrote."
                )
            yield f"{path}:{line}", record


def _place(at: str, value: Any) -> tuple[str, int]:
    match value:
        case [str(file), int(line)]:
            return file, line
    raise ValueError(f"{at}: {value!r} is no file and line. Give the file the step before wrote.")


def _keep(record: Record, text: str, line: int) -> Kept:
    return Kept()
