"""Find documents that are nearly the same, put them in groups, keep the first of each group."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatree.io.corpus.bands import band_hashes, buckets, choose_bands
from megatree.io.corpus.exact import normalized
from megatree.io.corpus.minhash import shingles, signatures, similarity
from megatree.io.corpus.places import Places, PlacesBuilder
from megatree.io.corpus.stream import (
    Job,
    Kept,
    Record,
    Tally,
    documents_of,
    filter_documents,
    map_documents,
    open_output,
)
from megatree.io.corpus.union import UnionFind
from megatree.io.preprocess.blocks import BadLine, Block, read_blocks
from megatree.io.preprocess.parallel import ordered_map
from megatree.io.preprocess.records import numbered_lines, parse_line

Measure = Literal["union", "min", "max"]

# In a bucket up to this size each document is compared with each. In a larger one, a document is
# compared with the first; those unlike it are tried again, as a bucket of their own.
_ALL_PAIRS = 32
_MOST_ROUNDS = 32
_PAIRS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """What counts as nearly the same.

    Attributes:
        threshold: similarity of the sets of 5-character pieces, from which a pair is written.
        measure: shared pieces over those of both (Jaccard), of the shorter or of the longer text.
        num_places: of a signature, a power of two; more find more of the pairs near the threshold.
        normalize: compare without regard to case and white space.
    """

    threshold: float = 0.7
    measure: Measure = "union"
    num_places: int = 256
    normalize: bool = True

    def __post_init__(self) -> None:
        choose_bands(self.threshold, 1)
        if self.num_places < 1 or self.num_places & (self.num_places - 1):
            raise ValueError(
                f"num-places: {self.num_places} is no power of two. Use 256 or 512, for example."
            )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search for pairs did.

    Attributes:
        documents: looked at.
        empty: of those, without text: compared with none.
        compared: pairs whose similarity was computed.
        pairs: of those, at or above the threshold.
        not_compared: documents of very large buckets, left after many rounds; each may miss pairs.
    """

    documents: int
    empty: int
    compared: int
    pairs: int
    not_compared: int


def find_pairs(job: Job, rules: NearDuplicates) -> Found:
    """Write the pairs of documents that are nearly the same, a JSON object a line.

    MinHash signatures propose pairs; each is then compared exactly, so no pair below the threshold
    is written. A pair above it is missed with a small probability that falls with its similarity.
    The normalized text of the inputs is kept in a temporary file beside the output meanwhile.

    Args:
        job: the files; the output takes the pairs.
        rules: what counts.

    Raises:
        ValueError: if an input cannot be read, or a line is bad and the job stops at those.
    """
    bands, rows = choose_bands(rules.threshold, rules.num_places)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.output.parent, prefix=".near-") as folder:
        spool = Path(folder) / "texts"
        places, starts, hashes = _read(job, rules, bands, rows, spool)
        sizes = np.diff(starts)
        search = _Search(hashes=hashes[sizes > 0], documents=np.nonzero(sizes > 0)[0])
        np.save(f"{spool}.npy", starts)
        compare = partial(_compare, str(spool), rules.measure)
        pairs = 0
        with open_output(job.output, overwrite=job.overwrite) as stream:
            for candidates in search.rounds():
                results = ordered_map(compare, _batches(candidates), workers=job.workers)
                for near in results:
                    found = [pair for pair in near if pair[2] >= rules.threshold]
                    search.near.update((a, b) for a, b, _ in found)
                    pairs += len(found)
                    stream.writelines(_pair_line(places, *pair) for pair in found)
    return Found(
        documents=len(places),
        empty=int((sizes == 0).sum()),
        compared=len(search.seen),
        pairs=pairs,
        not_compared=search.left,
    )


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


class _Search:
    """Proposes pairs of documents, round by round; `near` is told which of them are alike."""

    def __init__(self, *, hashes: np.ndarray, documents: np.ndarray) -> None:
        self.hashes = hashes
        self.documents = documents
        self.near: set[tuple[int, int]] = set()
        self.seen: set[tuple[int, int]] = set()
        self.left = 0

    def rounds(self) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of pairs to compare; before the next one, `near` must be up to date."""
        large: list[list[int]] = []
        first: list[tuple[int, int]] = []
        for band in range(self.hashes.shape[1]):
            for bucket in buckets(self.hashes[:, band]):
                members = self.documents[bucket].tolist()
                if len(members) <= _ALL_PAIRS:
                    first += self._new(combinations(members, 2))
                else:
                    large.append(members)
        yield first
        for _ in range(_MOST_ROUNDS):
            if not large:
                return
            yield self._new(pair for bucket in large for pair in _star(bucket))
            rest = [[b for a, b in _star(bucket) if (a, b) not in self.near] for bucket in large]
            large = [bucket for bucket in rest if len(bucket) > 1]
        self.left = len({document for bucket in large for document in bucket})

    def _new(self, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.seen]
        self.seen.update(new)
        return new


def _star(bucket: list[int]) -> list[tuple[int, int]]:
    return [(bucket[0], other) for other in bucket[1:]]


def _read(
    job: Job, rules: NearDuplicates, bands: int, rows: int, spool: Path
) -> tuple[Places, np.ndarray, np.ndarray]:
    """Return the places, the starts in the spool and the band hashes of all documents."""
    places = PlacesBuilder(job.inputs)
    hashes, sizes = [np.zeros((0, bands), np.uint64)], [np.zeros(1, np.int64)]
    work = partial(_sketch, job.key, job.max_line_bytes, rules, bands, rows)
    tally = Tally()
    with open(spool, "wb") as file:
        for texts, found, name, lines, bytes_read in map_documents(job, work):
            encoded = [text.encode() for text in texts]
            file.write(b"".join(encoded))
            sizes.append(np.array([len(one) for one in encoded], np.int64))
            hashes.append(found)
            places.add(name, lines)
            tally = tally.plus(Tally(documents=len(lines), bytes_read=bytes_read))
            job.report(tally)
    return places.build(), np.cumsum(np.concatenate(sizes)), np.concatenate(hashes)


def _sketch(
    key: str,
    max_line_bytes: int,
    rules: NearDuplicates,
    bands: int,
    rows: int,
    block: Block | BadLine,
) -> tuple[tuple[list[str], np.ndarray, str, list[int], int], list[BadLine]]:
    bad, texts, lines = [], [], []
    for one in documents_of(block, key, max_line_bytes):
        if isinstance(one, BadLine):
            bad.append(one)
            continue
        texts.append(normalized(one[3]) if rules.normalize else one[3])
        lines.append(one[0])
    hashes = band_hashes(signatures(texts, rules.num_places), bands, rows)
    size = len(block.data) if isinstance(block, Block) else 0
    return (texts, hashes, block.file, lines, size), bad


def _batches(pairs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    ordered = sorted(pairs)
    for start in range(0, len(ordered), _PAIRS_AT_ONCE):
        yield ordered[start : start + _PAIRS_AT_ONCE]


def _compare(
    spool: str, measure: Measure, pairs: list[tuple[int, int]]
) -> list[tuple[int, int, float]]:
    starts, texts = _spooled(spool, os.stat(spool).st_ino)
    # The first of neighbouring pairs is the same.
    known: dict[int, np.ndarray] = {}

    def pieces(document: int) -> np.ndarray:
        raw = texts[starts[document] : starts[document + 1]].tobytes()
        return shingles(raw.decode())

    out = []
    for a, b in pairs:
        if a not in known:
            known = {a: pieces(a)}
        out.append((a, b, similarity(known[a], pieces(b), measure)))
    return out


@lru_cache(maxsize=1)
def _spooled(spool: str, inode: int) -> tuple[np.ndarray, np.ndarray]:
    return np.load(f"{spool}.npy", mmap_mode="r"), np.memmap(spool, np.uint8, "r")


def _pair_line(places: Places, a: int, b: int, found: float) -> bytes:
    record = {
        "similarity": round(found, 6),
        "a": places.name(a),
        "b": places.name(b),
        "order": [int(places.files[a]), int(places.files[b])],
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


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
