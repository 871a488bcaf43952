"""Near duplicates: signatures estimate similarity, pairs are exact, groups keep their first."""

import functools
import json
import random
from itertools import combinations
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.corpus import NearDuplicates, drop_groups, find_pairs, group_pairs
from megatree.io.corpus.bands import choose_bands
from megatree.io.corpus.minhash import SHINGLE, shingles, signatures, similarity
from megatree.io.corpus.search import ALL_PAIRS
from megatree.io.corpus.stream import Job
from megatree.io.data.demo import load_demo

CHAPTERS = [text[:2000] for text in load_demo().texts[:30]]


def mixed(a: str, b: str, share: float) -> str:
    """`a` with its end replaced by that of `b`."""
    cut = int(len(a) * share)
    return a[:cut] + b[cut:]


@functools.cache
def pieces(text: str) -> set[str]:
    return {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)}


def brute(a: str, b: str) -> float:
    return len(pieces(a) & pieces(b)) / len(pieces(a) | pieces(b))


@hypothesis.given(st.text(min_size=SHINGLE), st.text(min_size=SHINGLE))
def test_similarity_is_that_of_the_sets_of_pieces(a: str, b: str) -> None:
    assert similarity(shingles(a), shingles(b), "union") == pytest.approx(brute(a, b))
    assert similarity(shingles(a), shingles(a + b), "min") == pytest.approx(1.0)


def test_signatures_agree_in_the_share_of_places_that_is_the_similarity() -> None:
    """The mean error of 128 places is 0.04: of 60 pairs, one off by 0.17 means a broken hash."""
    texts, expected = [], []
    for number, share in enumerate(np.linspace(0.05, 0.95, 60)):
        a, b = CHAPTERS[number % 30], CHAPTERS[(number + 7) % 30]
        texts += [a, mixed(a, b, share)]
        expected.append(brute(*texts[-2:]))
    found = signatures(texts, 128)
    estimated = (found[0::2] == found[1::2]).mean(axis=1)
    error = estimated - np.array(expected)
    assert np.abs(error).max() < 0.17
    assert abs(error.mean()) < 0.015, "no bias"


@pytest.mark.parametrize("length", [1, 4, 5, 6, 20])
def test_short_texts_have_signatures_of_their_own(length: int) -> None:
    """With fewer pieces than places most places are copies."""
    texts = [letter * length for letter in "abc"] + ["abcdefghijklmnopqrst"[:length]]
    found = signatures([*texts, *texts], 128)
    assert np.array_equal(found[:4], found[4:])
    assert all((found[a] == found[b]).mean() < 0.2 for a, b in combinations(range(3), 2))


def test_a_signature_does_not_depend_on_its_neighbours() -> None:
    texts = [CHAPTERS[0], *CHAPTERS[1].split()]
    alone = np.concatenate([signatures([text], 64) for text in texts])
    assert np.array_equal(signatures(texts, 64), alone)


def test_bands_miss_few_pairs_above_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.9):
        bands, rows = choose_bands(threshold, 256)
        assert bands * rows <= 256
        shared = 1 - (1 - np.linspace(threshold, 1, 50) ** rows) ** bands
        assert shared.mean() > 0.95
    with pytest.raises(ValueError, match=r"threshold: 1.0 is not between 0 and 1"):
        choose_bands(1.0, 128)


def corpus(tmp_path: Path, texts: list[str]) -> Job:
    path = tmp_path / "in.jsonl"
    lines = (json.dumps({"text": text, "n": n}) for n, text in enumerate(texts))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Job(inputs=(path,), output=tmp_path / "pairs.jsonl")


def pairs_of(job: Job) -> dict[tuple[int, int], float]:
    records = [json.loads(line) for line in job.output.read_text().splitlines()]
    return {(one["a"][1] - 1, one["b"][1] - 1): one["similarity"] for one in records}


def test_pairs_are_exact_and_nearly_all_found(tmp_path: Path) -> None:
    drawn = random.Random(1)
    texts = list(CHAPTERS)
    for _ in range(40):
        a, b = drawn.sample(CHAPTERS, 2)
        texts.append(mixed(a, b, drawn.uniform(0.4, 1.0)))
    texts += ["", "  \n"]
    job = corpus(tmp_path, texts)
    found = find_pairs(job, NearDuplicates(threshold=0.6, normalize=False))
    near = {
        (i, j): score
        for i, j in combinations(range(len(texts)), 2)
        if len(texts[i]) > 4 and len(texts[j]) > 4 and (score := brute(texts[i], texts[j])) >= 0.6
    }
    assert len(near) > 20
    written = pairs_of(job)
    assert written.keys() <= near.keys()
    for pair, score in written.items():
        assert score == pytest.approx(near[pair], abs=1e-6)
    assert len(written) >= 0.9 * len(near)
    assert {pair for pair, score in near.items() if score > 0.8} <= written.keys()
    assert (found.documents, found.empty, found.pairs) == (72, 1, len(written))
    assert found.compared < 0.2 * len(texts) ** 2, "not all with all"


def test_a_crowd_of_copies_is_compared_with_its_first_only(tmp_path: Path) -> None:
    """All pairs of a thousand copies would be half a million comparisons."""
    copies = [f"{CHAPTERS[0]} {number}" for number in range(10 * ALL_PAIRS)]
    job = corpus(tmp_path, [CHAPTERS[1], *copies, CHAPTERS[2]])
    found = find_pairs(job, NearDuplicates())
    assert found.compared < 3 * len(copies)
    assert found.not_compared == 0
    assert group_pairs(job.output, tmp_path / "groups.jsonl", threshold=0.7) == 1
    kept = Job(inputs=job.inputs, output=tmp_path / "kept.jsonl")
    tally = drop_groups(kept, tmp_path / "groups.jsonl")
    assert tally.dropped == {"duplicate": len(copies) - 1}
    lines = kept.output.read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [0, 1, len(copies) + 1]


def test_groups_connect_pairs_above_their_threshold(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [(0.9, "b3", "a9"), (0.8, "a9", "a1"), (0.6, "a1", "b7")]
    with open(pairs, "w", encoding="utf-8") as file:
        for score, *both in rows:
            (a, b) = ([name[0], int(name[1])] for name in both)
            order = ["ab".index(name[0]) for name in both]
            file.write(json.dumps({"similarity": score, "a": a, "b": b, "order": order}) + "\n")
    assert group_pairs(pairs, tmp_path / "g.jsonl", threshold=0.7) == 1
    group = json.loads((tmp_path / "g.jsonl").read_text())
    assert group == {"keep": ["a", 1], "drop": [["a", 9], ["b", 3]]}
    assert group_pairs(pairs, tmp_path / "h.jsonl", threshold=0.5) == 1
    assert len(json.loads((tmp_path / "h.jsonl").read_text())["drop"]) == 3


def test_files_of_other_steps_are_refused(tmp_path: Path) -> None:
    job = corpus(tmp_path, CHAPTERS[:2])
    with pytest.raises(ValueError, match=r"in.jsonl:1: no similarity, a, b, order"):
        group_pairs(job.inputs[0], tmp_path / "g", threshold=0.7)
    (tmp_path / "g").write_text('{"keep": ["x", 1], "drop": [["elsewhere.jsonl", 2]]}\n')
    with pytest.raises(ValueError, match=r"it names elsewhere.jsonl, which is no input"):
        drop_groups(Job(inputs=job.inputs, output=tmp_path / "o"), tmp_path / "g")
    with pytest.raises(ValueError, match=r"num-places: 100 is no power of two"):
        NearDuplicates(num_places=100)
