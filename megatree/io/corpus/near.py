"""Find the pairs of documents that are nearly the same."""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

from megatree.io.corpus.bands import band_hashes, choose_bands
from megatree.io.corpus.exact import normalized
from megatree.io.corpus.minhash import shingles, signatures, similarity
from megatree.io.corpus.places import Places, PlacesBuilder
from megatree.io.corpus.search import Search
from megatree.io.corpus.stream import Job, Tally, documents_of, map_documents, open_output
from megatree.io.preprocess.blocks import BadLine, Block
from megatree.io.preprocess.parallel import ordered_map

Measure = Literal["union", "min", "max"]

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
        search = Search(hashes=hashes[sizes > 0], documents=np.nonzero(sizes > 0)[0])
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
