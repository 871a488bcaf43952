"""Megatron's own files, byte for byte."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megatree.io.data.indexed import IndexedFile
from megatree.io.preprocess import Recipe, SentenceSplitter, preprocess
from megatree.io.tokenizers import TokenizerSpec
from tests.io.preprocess.corpora import write_lines


@pytest.fixture(scope="module")
def chapters(shared: Path) -> list[list[str]]:
    """Paragraphs of each of the first 40 chapters."""
    with open(shared / "data" / "corpus" / "austen.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(40), strict=False)]
    return [[part.strip() for part in text.split("\n\n") if part.strip()] for text in texts]


@pytest.mark.parametrize("num_inputs", [1, 3])
def test_documents_of_gpt2_are_megatrons_bytes(
    shared: Path, chapters: list[list[str]], num_inputs: int, tmp_path: Path
) -> None:
    paragraphs = [{"text": one, "other": 3} for chapter in chapters for one in chapter]
    cuts = np.linspace(0, len(paragraphs), num_inputs + 1).astype(int)
    inputs = [
        write_lines(tmp_path / f"{number}.jsonl", paragraphs[cuts[number] : cuts[number + 1]])
        for number in range(num_inputs)
    ]
    spec = TokenizerSpec(kind="gpt2", path=shared / "data" / "tokenizers" / "gpt2")
    summary = preprocess(inputs, str(tmp_path / "out"), Recipe(tokenizer=spec, append_eod=True))
    assert summary.counts.documents == 1661
    for suffix in (".bin", ".idx"):
        golden = shared / "goldens" / "data" / f"austen40_text_document{suffix}"
        made = tmp_path / f"out_text_document{suffix}"
        assert made.read_bytes() == golden.read_bytes()


def test_sentences_of_bert_are_megatrons_on_the_first_run(
    shared: Path, chapters: list[list[str]], tmp_path: Path
) -> None:
    """Megatron's first run with --split-sentences wrote no pair and ended well."""
    groups = [
        chapter[start : start + 3]
        for chapter in chapters[:30]
        for start in range(0, len(chapter), 3)
    ]
    golden = shared / "goldens" / "data" / "austen30_text_sentence"
    with gzip.open(f"{golden}s.json.gz", "rt", encoding="utf-8") as file:
        expected = json.load(file)
    splitter = SentenceSplitter()
    split = [[s for part in group for s in splitter.split(part)] for group in groups[:60]]
    assert [[" ".join(one.split()) for one in sentences] for sentences in split] == expected[:60]
    assert len(groups) == len(expected)

    spec = TokenizerSpec(kind="bert", path=shared / "data" / "tokenizers" / "bert-base-uncased")
    lines = write_lines(tmp_path / "in.jsonl", [{"text": group} for group in groups])
    summary = preprocess([lines], str(tmp_path / "out"), Recipe(tokenizer=spec, splitter=splitter))
    ours, theirs = IndexedFile(summary.prefixes["text"]), IndexedFile(golden)
    # Three documents that are in no text were put at 7, 8, 9.
    first, last = theirs.documents[[7, 10]]
    kept = [*range(first), *range(last, len(theirs))]
    assert ours.lengths.tolist() == theirs.lengths[kept].tolist()
    starts = np.cumsum(theirs.lengths)[[first - 1, last - 1]]
    tokens = np.concatenate([theirs.tokens[: starts[0]], theirs.tokens[starts[1] :]])
    assert np.array_equal(ours.tokens, tokens)
    counts = np.diff(theirs.documents)
    assert np.diff(ours.documents).tolist() == [*counts[:7], *counts[10:]]


def test_the_shipped_sentence_data_are_those_of_nltk(shared: Path) -> None:
    given = SentenceSplitter(data=shared / "data" / "tokenizers" / "punkt_english")
    text = "Mr. Smith went to Washington, D.C. on Jan. 5th. He liked it! Did he? i.e. yes."
    assert SentenceSplitter().split(text) == given.split(text)
    assert given.split(text)[1:3] == ["He liked it!", "Did he?"]
