"""Jobs: the same bytes from any input format, resumed, refused or reported, never half done."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatree.io.data.indexed import IndexedFile
from megatree.io.preprocess import Recipe, SentenceSplitter, preprocess
from megatree.io.preprocess.blocks import Unit
from megatree.io.preprocess.compressed import compressed_writer
from megatree.io.tokenizers import ByteTokenizer, TokenizerSpec, identity_beside, read_beside
from tests.io.preprocess.corpora import BYTES, documents, texts, write_lines

TEXTS = ["one two", "", "three\n\nfour", "f\u00fcnf \U0001f600"]
EOD = 256


def encoded(text: str) -> list[list[int]]:
    return [[*text.encode(), EOD]] if text else []


def pair_bytes(prefix: str) -> bytes:
    return Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()


def test_a_document_without_text_stays_and_gets_no_end(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    summary = preprocess([lines], str(tmp_path / "out"), BYTES)
    assert documents(summary.prefixes["text"]) == [encoded(text) for text in TEXTS]
    assert identity_beside(summary.prefixes["text"]) == ByteTokenizer().identity


def test_a_list_of_texts_is_a_document_of_several_sequences(tmp_path: Path) -> None:
    """Its end goes into the last sequence; sequences without ids are dropped, as in Megatron."""
    lines = write_lines(tmp_path / "a.jsonl", [{"text": ["ab", "", "c", ""]}, {"text": []}])
    summary = preprocess([lines], str(tmp_path / "out"), BYTES)
    assert documents(summary.prefixes["text"]) == [[[97, 98], [99, EOD]], []]


def test_each_key_gives_a_pair(tmp_path: Path) -> None:
    records = [{"title": text[:3], "text": text} for text in TEXTS]
    lines = write_lines(tmp_path / "a.jsonl", records)
    recipe = replace(BYTES, keys=("text", "title"))
    summary = preprocess([lines], str(tmp_path / "out"), recipe)
    assert texts(summary.prefixes["text"]) == TEXTS
    assert texts(summary.prefixes["title"]) == [text[:3] for text in TEXTS]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_compression_does_not_show(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    with open(path, "wb") as raw, compressed_writer(path, raw) as stream:
        stream.writelines(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    summary = preprocess([path], str(tmp_path / "out"), BYTES)
    assert texts(summary.prefixes["text"]) == TEXTS


def test_a_table_gives_the_same_pair_as_lines(tmp_path: Path) -> None:
    rows = [*TEXTS, *(f"row {number}" for number in range(700))]
    pq.write_table(pa.table({"n": range(len(rows)), "text": rows}), tmp_path / "a.parquet")
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in rows])
    made = [
        preprocess([path], str(tmp_path / path.suffix[1:]), BYTES).prefixes["text"]
        for path in (tmp_path / "a.parquet", lines)
    ]
    assert pair_bytes(made[0]) == pair_bytes(made[1])
    with pytest.raises(ValueError, match=r"a.parquet:1: no key 'body'"):
        preprocess([tmp_path / "a.parquet"], str(tmp_path / "b"), replace(BYTES, keys=("body",)))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut.parquet: it is no parquet file, or damaged"):
        preprocess([tmp_path / "cut.parquet"], str(tmp_path / "c"), BYTES)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", ["a", "b", "c", "d"]),
        ("paragraph", ["a\nb", "c\r\nd"]),
        ("file", [" a\nb\n \n\nc\r\nd\n"]),
    ],
)
def test_plain_text_is_cut_as_told(tmp_path: Path, unit: Unit, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf a\nb\n \n\nc\r\nd\n")
    summary = preprocess([path], str(tmp_path / "out"), replace(BYTES, text_unit=unit))
    assert texts(summary.prefixes["text"]) == expected


BAD = [
    (b'{"text": "ok"', "not JSON", "not JSON: Expecting ',' delimiter at character 13"),
    (b'{"text": "\xff"}', "not UTF-8", "not UTF-8: invalid start byte at byte 10"),
    (b'["text"]', "no object", "a JSON list, not an object with keys"),
    (b'{"body": "x"}', "key missing", "no key 'text' (it has: 'body')"),
    (b'{"text": null}', "not text", "key 'text' holds NoneType, not text"),
    (b'{"text": ["a", 3]}', "not text", "key 'text' holds int, not text"),
    (
        rb'{"text": "a\ud83d"}',
        "lone surrogate",
        "key 'text' holds a lone surrogate (half of a UTF-16 pair), U+D83D at character 1",
    ),
    (b"[" * 100_000, "not JSON", "JSON nested too deeply"),
    (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not JSON", "not JSON that Python reads"),
    (b'{"text": "' + b"x" * 200_000 + b'"}', "too long", "200012 bytes, more than the 150000"),
]


@pytest.mark.parametrize(("line", "kind", "detail"), BAD, ids=[f"{b[1]}-{len(b[0])}" for b in BAD])
def test_a_bad_line_stops_the_job_or_is_listed(
    tmp_path: Path, line: bytes, kind: str, detail: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}')
    recipe = replace(BYTES, max_line_bytes=150_000)
    with pytest.raises(ValueError, match=r"a.jsonl:3: ") as stopped:
        preprocess([path], str(tmp_path / "out"), recipe)
    assert str(stopped.value).startswith(f"{path}:3: {detail}")
    assert "--on-bad-line skip" in str(stopped.value)
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]

    summary = preprocess([path], str(tmp_path / "out"), recipe, on_bad_line="skip")
    assert texts(summary.prefixes["text"]) == ["first", "last"]
    assert summary.counts.bad == {kind: 1}
    assert summary.bad_lines is not None
    (listed,) = (json.loads(one) for one in summary.bad_lines.read_text().splitlines())
    assert (listed["file"], listed["line"], listed["kind"]) == (str(path), 3, kind)
    assert listed["detail"].startswith(detail)


def test_a_word_that_is_no_id_is_found_among_good_ones(tmp_path: Path) -> None:
    recipe = Recipe(tokenizer=TokenizerSpec(kind="null", vocab_size=10, eod_id=9), append_eod=True)
    lines = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in ("1 2", "3 x", "10", "4")])
    summary = preprocess([lines], str(tmp_path / "out"), recipe, on_bad_line="skip")
    assert documents(summary.prefixes["text"]) == [[[1, 2, 9]], [[4, 9]]]
    assert summary.counts.bad == {"not ids": 2}
    with pytest.raises(ValueError, match=r"a.jsonl:2: null tokenizer: 'x' is no id in 0..9"):
        preprocess([lines], str(tmp_path / "other"), recipe)


@pytest.mark.parametrize("vocab_size", [65499, 65500, 65535, 65536, 65537])
def test_ids_of_vocabularies_around_65536_come_back(tmp_path: Path, vocab_size: int) -> None:
    """Megatron's fast path took files of 65500 to 65536 entries for 16-bit ones."""
    spec = TokenizerSpec(kind="null", vocab_size=vocab_size, eod_id=vocab_size - 1)
    lines = write_lines(tmp_path / "a.jsonl", [{"text": f"0 {vocab_size - 2}"}])
    summary = preprocess([lines], str(tmp_path / "out"), Recipe(tokenizer=spec, append_eod=True))
    prefix = summary.prefixes["text"]
    assert documents(prefix) == [[[0, vocab_size - 2, vocab_size - 1]]]
    assert IndexedFile(prefix).dtype == (np.uint16 if vocab_size < 65500 else np.int32)


def test_sentences_keep_the_white_space_after_them_when_told(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "One.\nTwo is next.  End"}])
    made = {}
    for keep in (False, True):
        recipe = Recipe(tokenizer=BYTES.tokenizer, splitter=SentenceSplitter(keep_newlines=keep))
        prefix = preprocess([lines], str(tmp_path / str(keep)), recipe).prefixes["text"]
        assert prefix.endswith("_text_sentence")
        made[keep] = [bytes(one).decode() for one in documents(prefix)[0]]
    assert made == {
        False: ["One.", "Two is next.", "End"],
        True: ["One.\n", "Two is next.  ", "End"],
    }
    with pytest.raises(ValueError, match=r"it has no abbrev_types.txt. Name a folder of punkt"):
        SentenceSplitter(data=tmp_path).split("a")


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Blocks of a megabyte, of uneven cost, and a bad line between."""
    records = [{"text": f"{n} " * (n % 3000)} for n in range(600)]
    lines = write_lines(tmp_path / "a.jsonl", [*records, {"no": 1}, *records])
    made = [
        preprocess([lines], str(tmp_path / f"w{n}"), BYTES, workers=n, on_bad_line="skip")
        for n in (1, 2)
    ]
    assert pair_bytes(made[0].prefixes["text"]) == pair_bytes(made[1].prefixes["text"])
    assert made[0].counts == made[1].counts


def test_a_stopped_job_goes_on_with_the_first_input_that_is_missing(tmp_path: Path) -> None:
    inputs = [write_lines(tmp_path / f"{n}.jsonl", [{"text": f"{n} {TEXTS[0]}"}]) for n in range(4)]
    good = inputs[2].read_text()
    inputs[2].write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2.jsonl:1: not JSON"):
        preprocess(inputs, str(tmp_path / "out"), BYTES)
    assert not list(tmp_path.glob("out_text*"))
    inputs[2].write_text(good, encoding="utf-8")
    seen = []
    summary = preprocess(inputs, str(tmp_path / "out"), BYTES, report=seen.append)
    assert summary.reused == 2
    assert texts(summary.prefixes["text"]) == [f"{n} {TEXTS[0]}" for n in range(4)]
    assert seen[-1].position == seen[-1].size
    assert [one.counts.documents for one in seen] == sorted(one.counts.documents for one in seen)
    assert not (tmp_path / "out.parts").exists()

    again = preprocess(inputs, str(tmp_path / "out"), BYTES)
    assert (again.reused, again.counts) == (4, summary.counts)


def test_a_part_of_other_text_or_settings_is_not_used(tmp_path: Path) -> None:
    inputs = [write_lines(tmp_path / f"{n}.jsonl", [{"text": "old"}]) for n in range(2)]
    stopped = [*inputs, write_lines(tmp_path / "bad.jsonl", [3])]
    with pytest.raises(ValueError, match=r"bad.jsonl:1: a JSON int"):
        preprocess(stopped, str(tmp_path / "out"), BYTES)
    write_lines(inputs[0], [{"text": "new!"}])
    summary = preprocess(inputs, str(tmp_path / "out"), BYTES)
    assert summary.reused == 1
    assert texts(summary.prefixes["text"]) == ["new!", "old"]
    with pytest.raises(ValueError, match=r"bad.jsonl:1"):
        preprocess(stopped, str(tmp_path / "p"), BYTES)
    assert preprocess(inputs, str(tmp_path / "p"), replace(BYTES, append_eod=False)).reused == 0


def test_a_pair_of_other_text_is_replaced_only_when_told(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "old"}])
    preprocess([lines], str(tmp_path / "out"), BYTES)
    write_lines(lines, [{"text": "newer"}])
    with pytest.raises(ValueError, match=r"out_text_document.bin, .*already there.*--overwrite"):
        preprocess([lines], str(tmp_path / "out"), BYTES)
    summary = preprocess([lines], str(tmp_path / "out"), BYTES, overwrite=True)
    assert texts(summary.prefixes["text"]) == ["newer"]
    facts = read_beside(summary.prefixes["text"])
    assert facts is not None
    assert facts["inputs"][0]["size"] == lines.stat().st_size


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])

    def append(progress: object) -> None:
        with open(lines, "a", encoding="utf-8") as file:
            file.write('{"text": "late"}\n')

    with pytest.raises(ValueError, match=r"a.jsonl: it changed while it was read"):
        preprocess([lines], str(tmp_path / "out"), BYTES, report=append)
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_jobs_that_cannot_be_are_refused_before_any_work(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"0 inputs give no pair"):
        preprocess([], out, BYTES)
    with pytest.raises(ValueError, match=r"x.json5: the suffix '.json5' tells no format"):
        preprocess([tmp_path / "x.json5"], out, BYTES)
    with pytest.raises(ValueError, match=r"nothing.jsonl: No such file"):
        preprocess([lines, tmp_path / "nothing.jsonl"], out, BYTES)
    with pytest.raises(ValueError, match=r"plain text has no keys, and 2 are named"):
        preprocess([lines], out, replace(BYTES, keys=("a", "b")), form="text")
    with pytest.raises(ValueError, match=r"json-keys: 'a/b' cannot be part of a file name"):
        replace(BYTES, keys=("a/b",))
    with pytest.raises(ValueError, match=r"must be different"):
        replace(BYTES, keys=("a", "a"))
    with pytest.raises(ValueError, match=r"workers: 0 do no work"):
        preprocess([lines], out, BYTES, workers=0)
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]
