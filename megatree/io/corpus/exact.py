"""Drop documents whose text another one before them has, in two passes and 28 bytes a document."""

import hashlib
import re
from functools import partial
from typing import Literal

import numpy as np

from megatree.io.corpus.places import PlacesBuilder
from megatree.io.corpus.stream import (
    Job,
    Kept,
    Record,
    Tally,
    documents_of,
    filter_documents,
    map_documents,
)
from megatree.io.preprocess.blocks import BadLine, Block

Normalize = Literal["none", "case-and-space"]


def drop_exact_duplicates(job: Job, *, normalize: Normalize = "none") -> Tally:
    """Write each text once: the first document that has it, in the order of the inputs.

    Args:
        job: the files; they are read twice.
        normalize: compare texts as they are, or without regard to case and white space.

    Raises:
        ValueError: if an input cannot be read, or a line is bad and the job stops at those.
    """
    digests, places = [], PlacesBuilder(job.inputs)
    work = partial(_digests, job.key, job.max_line_bytes, normalize)
    for found, file, lines in map_documents(job, work):
        digests.append(found)
        places.add(file, lines)
    every = np.concatenate([np.zeros((0, 16), np.uint8), *digests])
    _, first = np.unique(every.view("V16").ravel(), return_index=True)
    repeated = np.ones(len(every), bool)
    repeated[first] = False
    return filter_documents(job, _keep, drop_lines=places.build().only(repeated).between)


def normalized(text: str) -> str:
    """Return a text in lower case with single spaces."""
    return re.sub(r"\s+", " ", text.lower()).strip()


def _digests(
    key: str, max_line_bytes: int, normalize: Normalize, block: Block | BadLine
) -> tuple[tuple[np.ndarray, str, list[int]], list[BadLine]]:
    bad, digests, lines = [], [], []
    for one in documents_of(block, key, max_line_bytes):
        if isinstance(one, BadLine):
            bad.append(one)
            continue
        line, _, _, text = one
        compared = text if normalize == "none" else normalized(text)
        digests.append(hashlib.blake2b(compared.encode(), digest_size=16).digest())
        lines.append(line)
    found = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    return (found, block.file, lines), bad


def _keep(record: Record, text: str, line: int) -> Kept:
    return Kept()
