"""Pairs are written back, merged and looked into; what does not belong together is refused."""

import gzip
import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from megatree.io.data.indexed import IndexedWriter
from megatree.io.preprocess import Recipe, export, inspect_pair, merge, preprocess
from megatree.io.preprocess.meter import Meter
from megatree.io.tokenizers import NullTokenizer, TokenizerSpec, identity_beside
from tests.io.preprocess.corpora import BYTES, documents, texts, write_lines

VALUES = ["one two", ["a", "b\u00e9"], "\U0001f600", "x" * 999]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": value} for value in VALUES])
    return preprocess([lines], str(tmp_path / "a"), BYTES).prefixes["text"]


def test_a_pair_comes_back_as_text_and_as_the_same_pair(tmp_path: Path, prefix: str) -> None:
    output = tmp_path / "back.jsonl.gz"
    assert export(prefix, output, key="body") == len(VALUES)
    with gzip.open(output, "rt", encoding="utf-8") as file:
        assert [json.loads(line)["body"] for line in file] == VALUES
    again = preprocess([output], str(tmp_path / "b"), replace(BYTES, keys=("body",)))
    for suffix in (".bin", ".idx"):
        there = Path(again.prefixes["body"] + suffix).read_bytes()
        assert there == Path(prefix + suffix).read_bytes()
    with pytest.raises(ValueError, match=r"back.jsonl.gz: already there.*--overwrite"):
        export(prefix, output)


def test_ids_are_written_without_a_tokenizer(tmp_path: Path, prefix: str) -> None:
    Path(f"{prefix}.meta.json").unlink()
    with pytest.raises(ValueError, match=r"nothing beside it says which tokenizer made it"):
        export(prefix, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
    export(prefix, tmp_path / "x.jsonl", as_ids=True)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == documents(prefix)


def test_a_pair_is_not_decoded_with_another_tokenizer(tmp_path: Path, prefix: str) -> None:
    other = TokenizerSpec(kind="null", vocab_size=300, eod_id=0)
    with pytest.raises(ValueError, match=r"but the given tokenizer was made with sha256"):
        export(prefix, tmp_path / "x.jsonl", tokenizer=other)
    Path(f"{prefix}.meta.json").unlink()
    small = TokenizerSpec(kind="null", vocab_size=100, eod_id=0)
    with pytest.raises(ValueError, match=r"document 0: decode: id 111 at position 0 is outside"):
        export(prefix, tmp_path / "x.jsonl", tokenizer=small)


def test_merged_pairs_stand_in_order_and_keep_their_tokenizer(tmp_path: Path, prefix: str) -> None:
    lines = write_lines(tmp_path / "b.jsonl", [{"text": "last"}])
    other = preprocess([lines], str(tmp_path / "b"), BYTES).prefixes["text"]
    merge([prefix, other, prefix], tmp_path / "m")
    assert documents(tmp_path / "m") == documents(prefix) + documents(other) + documents(prefix)
    assert identity_beside(tmp_path / "m") == identity_beside(prefix)
    Path(f"{other}.meta.json").unlink()
    merge([prefix, other], tmp_path / "n")
    assert identity_beside(tmp_path / "n") is None, "it would speak for the other pair too"


def test_pairs_that_do_not_belong_together_are_not_merged(tmp_path: Path, prefix: str) -> None:
    lines = write_lines(tmp_path / "b.jsonl", [{"text": "1 2"}])
    null = Recipe(tokenizer=TokenizerSpec(kind="null", vocab_size=300, eod_id=0))
    other = preprocess([lines], str(tmp_path / "b"), null).prefixes["text"]
    with pytest.raises(ValueError, match=r"b_text_document: its ids come from .*a_text_document"):
        merge([prefix, other], tmp_path / "m")
    with pytest.raises(ValueError, match=r"it is one of the pairs to merge"):
        merge([prefix], prefix, overwrite=True)
    assert not list(tmp_path.glob("m*"))


def test_an_inspection_counts_all_and_finds_ids_outside(tmp_path: Path, prefix: str) -> None:
    found = inspect_pair(prefix)
    assert (found.documents, found.empty_documents, found.sequences) == (4, 0, 5)
    assert found.tokens == 7 + 1 + 1 + 3 + 1 + 4 + 1 + 999 + 1
    assert (found.smallest_id, found.largest_id, found.dtype) == (32, 256, "uint16")
    assert found.tokens_per_document is not None
    assert found.tokens_per_document.largest == 1000
    assert found.tokens_per_sequence is not None
    assert found.tokens_per_sequence.smallest == 1
    with pytest.raises(ValueError, match=r"token 7 \(document 0\) is 256, outside the vocab.* 256"):
        inspect_pair(prefix, vocab_size=256)
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, tmp_path / f"c{suffix}")
    assert inspect_pair(tmp_path / "c").tokenizer is None
    with IndexedWriter(tmp_path / "empty", "int32"):
        pass
    empty = inspect_pair(tmp_path / "empty")
    assert (empty.documents, empty.largest_id, empty.tokens_per_document) == (0, None, None)


def test_the_meter_says_documents_and_megabytes_per_second() -> None:
    seconds = iter([0.0, 0.0, 5.0, 5.0, 20.0, 20.0, 21.0, 21.0])
    stream = StringIO()
    with Meter("work", stream=stream, clock=lambda: next(seconds)) as meter:
        meter.show(5, 1_000_000, done=1, total=4)
        meter.show(100, 50_000_000, done=2, total=4)
        meter.show(101, 51_000_000)
    line = "work: 50%  100 documents  5 documents/s  2.50 MB/s\n"
    assert stream.getvalue() == line


def test_texts_of_a_pair_are_those_of_the_null_tokenizer_too(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "5  6\n7"}])
    spec = TokenizerSpec(kind="null", vocab_size=9, eod_id=8)
    prefix = preprocess([lines], str(tmp_path / "a"), Recipe(tokenizer=spec)).prefixes["text"]
    assert identity_beside(prefix) == NullTokenizer(vocab_size=9, eod=8).identity
    export(prefix, tmp_path / "b.jsonl")
    assert json.loads((tmp_path / "b.jsonl").read_text()) == {"text": "5 6 7"}
    assert texts(prefix) == ["\x05\x06\x07"]
