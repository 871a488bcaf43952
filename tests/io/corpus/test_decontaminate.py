"""Text of evaluation sets is cut out with its surroundings, common phrases are not."""

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from megatree.io.corpus import Decontamination, decontaminate
from megatree.io.corpus.decontaminate import pieces_of
from megatree.io.corpus.evaluation import Evaluations, words
from megatree.io.corpus.stream import Job

QUESTION = "Who was the first person to walk on the moon and when did that happen exactly?"
FILLER = "Nothing of this sentence stands in any set. "
RULES = Decontamination(margin=20, min_piece=30, max_cuts=3)


def evaluations(tmp_path: Path, *texts: str, **options: int) -> Evaluations:
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"q": text, "n": 1}) + "\n" for text in texts))
    return Evaluations.read([path], ["q", "answer"], **options)


def test_a_match_is_found_whatever_its_case_and_punctuation(tmp_path: Path) -> None:
    found = evaluations(tmp_path, QUESTION)
    text = FILLER + QUESTION.upper().replace(" ", ", ") + FILLER
    (start, _, _), *more = found.matches(text)
    assert text[start:].startswith("WHO, WAS")
    assert len(more) == len(words(QUESTION)) - 13
    assert not list(found.matches(FILLER * 10))
    assert not list(found.matches(" ".join(QUESTION.split()[:12]))), "12 words are too few"


def test_a_short_evaluation_text_is_looked_for_whole(tmp_path: Path) -> None:
    found = evaluations(tmp_path, "one two three four five six seven eight nine", "too short", "x")
    assert (len(found.grams), found.texts, found.too_short) == (1, 3, 2)
    assert list(found.matches("zero one two three four five six seven eight nine ten"))
    assert not list(found.matches("one two three four five six seven eight"))


def test_what_surrounds_a_match_goes_too_up_to_a_sentence(tmp_path: Path) -> None:
    text = FILLER * 5 + QUESTION + " " + FILLER * 5
    pieces, cuts = pieces_of(text, evaluations(tmp_path, QUESTION), RULES)
    assert cuts == 1
    assert pieces == [(FILLER * 4).strip(), FILLER * 4]


def test_documents_are_cut_dropped_or_left_as_they_are(tmp_path: Path) -> None:
    documents = [
        FILLER * 9,
        FILLER * 5 + QUESTION + " " + FILLER * 5,
        QUESTION,
        (FILLER * 5 + QUESTION + " ") * 5,
    ]
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t, "id": n}) + "\n" for n, t in enumerate(documents))
    )
    job = Job(inputs=(path,), output=tmp_path / "out.jsonl")
    tally = decontaminate(job, evaluations(tmp_path, QUESTION), RULES)
    kept = [json.loads(line) for line in job.output.read_text().splitlines()]
    assert [(one["id"], one.get("piece")) for one in kept] == [(0, None), (1, 0), (1, 1)]
    assert tally.dropped == {"more than 3 cuts": 1, "nothing left after cuts": 1}
    assert (tally.documents, tally.written, tally.notes) == (2, 3, {"cut": 1})


def test_a_phrase_that_is_common_in_the_corpus_stays(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    phrase = "all rights reserved no part of this book may be copied in any form"
    path.write_text("".join(json.dumps({"text": f"{n} {phrase}"}) + "\n" for n in range(12)))
    for most, documents in ((12, 0), (11, 12), (None, 0)):
        job = Job(inputs=(path,), output=tmp_path / f"{most}.jsonl")
        rules = Decontamination(max_occurrences=most)
        assert decontaminate(job, evaluations(tmp_path, phrase), rules).documents == documents


@hypothesis.given(
    text=st.lists(st.sampled_from(["a", "b", "c", ". "]), max_size=40).map(" ".join),
    margin=st.integers(0, 5),
)
@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_no_piece_holds_a_match(tmp_path: Path, text: str, margin: int) -> None:
    found = evaluations(tmp_path, "a b a", "c c a", num_words=3, min_words=3)
    rules = Decontamination(margin=margin, min_piece=0)
    pieces, cuts = pieces_of(text, found, rules)
    assert not any(list(found.matches(piece)) for piece in pieces)
    assert (cuts == 0) == (not list(found.matches(text)))
    assert all(piece in text for piece in pieces)


def test_evaluation_files_of_the_shared_folder_are_read(shared: Path) -> None:
    folder = shared / "data" / "eval"
    lambada = Evaluations.read([folder / "lambada_openai_100.jsonl"], ["context"])
    assert lambada.texts == 100
    assert len(lambada.grams) > 4000
    wiki = Evaluations.read([folder / "wikitext-2" / "wiki.valid.tokens"], [])
    assert wiki.texts > 1000


def test_evaluation_files_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"a": "b"}\n')
    with pytest.raises(ValueError, match=r"e.jsonl: it holds no text under text. Name its keys"):
        Evaluations.read([tmp_path / "e.jsonl"], ["text"])
    (tmp_path / "e.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"e.jsonl:1: not JSON"):
        Evaluations.read([tmp_path / "e.jsonl"], ["text"])
    with pytest.raises(ValueError, match=r"min-words: 9 is not from 1 to num-words, 8"):
        Evaluations.read([], ["text"], num_words=8, min_words=9)
