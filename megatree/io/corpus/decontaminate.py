"""Cut out of training text what evaluation sets hold, with some text on either side."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

from megatree.io.corpus.evaluation import Evaluations, Gram
from megatree.io.corpus.stream import (
    Dropped,
    Job,
    Kept,
    Record,
    Tally,
    Verdict,
    documents_of,
    filter_documents,
    map_documents,
)
from megatree.io.preprocess.blocks import BadLine, Block

_ENDS_OF_SENTENCES = ".!?\n"


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """What is cut out around a match, and what becomes of the rest.

    Attributes:
        margin: characters removed on either side of a match; then on to the end of a sentence.
        min_piece: the shortest piece of a cut document that stays, in characters.
        max_cuts: a document with more cuts is dropped.
        max_occurrences: n-grams found more often in the whole corpus are common phrases and stay;
            None cuts out all.
    """

    margin: int = 200
    min_piece: int = 200
    max_cuts: int = 10
    max_occurrences: int | None = 10

    def __post_init__(self) -> None:
        for name in ("margin", "min_piece", "max_cuts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative. Use 0 or more.")


def decontaminate(job: Job, evaluations: Evaluations, rules: Decontamination) -> Tally:
    """Write the documents of a job without what evaluation sets hold.

    A document that holds a match is cut there: each piece becomes a document with all keys of the
    whole and `piece`, its number.

    Args:
        job: the files; read twice if common phrases stay.
        evaluations: what to look for.
        rules: how to cut.

    Raises:
        ValueError: if an input cannot be read, or a line is bad and the job stops at those.
    """
    if rules.max_occurrences is not None:
        common = {
            gram
            for gram, count in _occurrences(job, evaluations).items()
            if count > rules.max_occurrences
        }
        evaluations = replace(evaluations, grams=evaluations.grams - common)
    return filter_documents(job, partial(_judge, evaluations, rules, job.key))


def pieces_of(text: str, evaluations: Evaluations, rules: Decontamination) -> tuple[list[str], int]:
    """Return the pieces of a text between matches, and the number of cuts."""
    kept: list[str] = []
    begin = cuts = 0
    for start, end, _ in evaluations.matches(text):
        if start >= begin:  # else it begins in what is cut out already, and prolongs that
            cuts += 1
            kept.append(_up_to_sentence(text[begin : max(begin, start - rules.margin)]))
        begin = max(begin, _next_sentence(text, min(len(text), end + rules.margin)))
    kept.append(text[begin:])
    return ([text], 0) if not cuts else ([p for p in kept if len(p) >= rules.min_piece], cuts)


def _judge(
    evaluations: Evaluations, rules: Decontamination, key: str, record: Record, text: str, line: int
) -> Verdict:
    pieces, cuts = pieces_of(text, evaluations, rules)
    if not cuts:
        return Kept()
    if cuts > rules.max_cuts:
        return Dropped(reason=f"more than {rules.max_cuts} cuts")
    if not any(piece.strip() for piece in pieces):
        return Dropped(reason="nothing left after cuts")
    records = tuple({**record, key: piece, "piece": at} for at, piece in enumerate(pieces))
    return Kept(records=records, notes=("cut",))


def _up_to_sentence(text: str) -> str:
    """Return a text up to the end of its last whole sentence; all of it if it has none."""
    end = max(text.rfind(mark) for mark in _ENDS_OF_SENTENCES) + 1
    return text[: end or len(text)].rstrip()


def _next_sentence(text: str, start: int) -> int:
    """Return where the first sentence after `start` begins; the end of the text if none does."""
    ends = [at for mark in _ENDS_OF_SENTENCES if (at := text.find(mark, start)) >= 0]
    at = min(ends, default=len(text) - 1) + 1
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _occurrences(job: Job, evaluations: Evaluations) -> Counter[Gram]:
    counts: Counter[Gram] = Counter()
    for found in map_documents(job, partial(_count, evaluations, job.key, job.max_line_bytes)):
        counts.update(found)
    return counts


def _count(
    evaluations: Evaluations, key: str, max_line_bytes: int, block: Block | BadLine
) -> tuple[Counter[Gram], list[BadLine]]:
    bad: list[BadLine] = []
    counts: Counter[Gram] = Counter()
    for one in documents_of(block, key, max_line_bytes):
        if isinstance(one, BadLine):
            bad.append(one)
        else:
            counts.update(gram for _, _, gram in evaluations.matches(one[3]))
    return counts, bad
