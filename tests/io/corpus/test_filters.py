"""Filters on loose JSON: every document is kept or counted as dropped, in order, byte for byte."""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from megatree.io.corpus import (
    BlockList,
    Cleanup,
    clean,
    drop_exact_duplicates,
    filter_urls,
)
from megatree.io.corpus.exact import Normalize
from megatree.io.corpus.language import language_of
from megatree.io.corpus.stream import Job
from megatree.io.preprocess.compressed import open_source
from megatree.io.tokenizers import TokenizerSpec

ENGLISH = "It is a truth universally acknowledged, that a single man must be in want of a wife."
GERMAN = "Es war einmal ein Mann, der hatte einen Esel, welcher schon lange Jahre gedient hatte."
FRENCH = "Longtemps, je me suis couch\u00e9 de bonne heure, et mes yeux se fermaient tout de suite."


def job_of(tmp_path: Path, records: Iterable[Any], **options: Any) -> Job:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
    return Job(inputs=(path,), output=tmp_path / "out.jsonl", **options)


def read(path: Path) -> list[Any]:
    with open_source(path) as source:
        return [json.loads(line) for line in source.read(1 << 24).splitlines()]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.org/a", None),
        ("https://bad.org/a", "url: blocked domain"),
        ("https://www.bad.org./a", "url: blocked domain"),
        ("https://BAD.org:80/a", "url: blocked domain"),
        ("https://notbad.org/a", None),
        ("https://example.org/x.JPG?s=1", "url: blocked file type"),
        ("http://a.b", None),
        ("a.b/c", "url: too short"),
        ("ftp://example.org/a", "url: malformed"),
        ("https://example/a b", "url: malformed"),
        ("https://[::1/a", "url: malformed"),
        ("not a url at all", "url: malformed"),
    ],
)
def test_addresses_are_judged(url: str, reason: str | None) -> None:
    assert BlockList(domains=frozenset({"bad.org"})).reason(url) == reason


def test_lists_of_addresses_lose_what_is_blocked_or_repeated(tmp_path: Path) -> None:
    (tmp_path / "block.txt").write_text("# list\n*.bad.org\n\nworse.net  # why\n")
    blocked = BlockList.read([tmp_path / "block.txt"])
    assert blocked.domains == {"bad.org", "worse.net"}
    urls = ["https://a.org/1", "https://x.bad.org/", "https://a.org/1", "nonsense here", "x"]
    (tmp_path / "urls.txt").write_text("\n".join(urls))
    tally = filter_urls([tmp_path / "urls.txt"], tmp_path / "out.txt", blocked)
    assert (tmp_path / "out.txt").read_text() == "https://a.org/1\n"
    assert tally.dropped == {
        "url: blocked domain": 1,
        "url: repeated": 1,
        "url: malformed": 1,
        "url: too short": 1,
    }
    (tmp_path / "block.txt").write_text("ok.org\nhttps://x.org/a\n")
    with pytest.raises(ValueError, match=r"block.txt:2: 'https://x.org/a' is no domain"):
        BlockList.read([tmp_path / "block.txt"])


def test_cleanup_mends_keeps_and_drops_with_reasons(tmp_path: Path) -> None:
    broken = ENGLISH.replace("'", "") + " caf\u00c3\u00a9"
    records = [
        {"text": ENGLISH, "url": "https://a.org/x"},
        {"url": "https://bad.org/x", "text": ENGLISH},
        {"text": GERMAN},
        {"text": FRENCH},
        {"text": broken, "id": 7},
        {"text": "  \n"},
        {"text": "Short."},
        {"text": ENGLISH * 100},
    ]
    rules = Cleanup(
        blocked=BlockList(domains=frozenset({"bad.org"})), min_characters=20, max_characters=5000
    )
    tally = clean(job_of(tmp_path, records), rules)
    kept = read(tmp_path / "out.jsonl")
    assert kept == [records[0], {"text": broken.replace("\u00c3\u00a9", "\u00e9"), "id": 7}]
    assert tally.dropped == {
        "url: blocked domain": 1,
        "language de": 1,
        "language fr": 1,
        "empty": 1,
        "too few characters": 1,
        "too many characters": 1,
    }
    assert tally.notes == {"text mended": 1}
    assert tally.documents + sum(tally.dropped.values()) == len(records)
    first = (tmp_path / "in.jsonl").read_bytes().splitlines()[0]
    assert (tmp_path / "out.jsonl").read_bytes().splitlines()[0] == first


def test_short_documents_are_counted_in_tokens(tmp_path: Path) -> None:
    """Long ones are not: 8 characters a token hold them."""
    records = [{"text": "a" * n} for n in (9, 10, 79, 80)]
    rules = Cleanup(
        languages=(), min_tokens=10, tokenizer=TokenizerSpec(kind="bytes"), fix_text=False
    )
    tally = clean(job_of(tmp_path, records), rules)
    assert tally.dropped == {"too few tokens": 1}
    null = replace(rules, tokenizer=TokenizerSpec(kind="null", vocab_size=9, eod_id=8))
    job = job_of(tmp_path, [{"text": "1 " * 39}, {"text": "1 " * 5}], overwrite=True)
    assert clean(job, null).dropped == {"too few tokens": 1}
    with pytest.raises(ValueError, match=r"min-tokens: 5 with no tokenizer. Give both"):
        Cleanup(min_tokens=5)


def test_languages_are_those_of_the_library() -> None:
    assert [language_of(text) for text in (ENGLISH, GERMAN, FRENCH)] == ["en", "de", "fr"]


def test_an_unknown_language_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"languages: english unknown. Use ISO 639-1"):
        clean(job_of(tmp_path, [{"text": "a"}]), Cleanup(languages=("english",)))


def test_a_missing_package_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"fix-text: the package 'ftfy' is not installed"):
        clean(job_of(tmp_path, [{"text": "a"}]), Cleanup(languages=()))
    assert not (tmp_path / "out.jsonl").exists()


@hypothesis.given(
    names=st.lists(st.sampled_from(["a", "b", "A", " a", "c  d", "c d"]), max_size=12),
    normalize=st.sampled_from(["none", "case-and-space"]),
)
@hypothesis.settings(
    max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_exact_duplicates_leave_the_first_of_each_text(
    tmp_path: Path, names: list[str], normalize: Normalize
) -> None:
    """Against the obvious program."""
    job = job_of(tmp_path, [{"text": name, "n": n} for n, name in enumerate(names)], overwrite=True)
    tally = drop_exact_duplicates(job, normalize=normalize)
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        key = name if normalize == "none" else " ".join(name.lower().split())
        seen.setdefault(key, number)
    assert [one["n"] for one in read(job.output)] == list(seen.values())
    assert tally.dropped.get("duplicate", 0) == len(names) - len(seen)


def test_duplicates_are_found_across_files_and_bad_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\nnot json\n')
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n{"no": 1}\n{"text": "z"}\n{"text": "x"}')
    inputs = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    job = Job(inputs=inputs, output=tmp_path / "out.jsonl.zst", on_bad_line="skip", workers=2)
    tally = drop_exact_duplicates(job)
    assert read(job.output) == [{"text": "x"}, {"text": "y"}, {"text": "z"}]
    assert tally.dropped == {
        "bad line: key missing": 1,
        "bad line: not JSON": 1,
        "duplicate": 2,
    }
    with pytest.raises(ValueError, match=r"a.jsonl:4: not JSON.*--on-bad-line skip"):
        drop_exact_duplicates(replace(job, on_bad_line="stop", output=tmp_path / "o"))


def test_jobs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"0 files hold no documents"):
        Job(inputs=(), output=tmp_path / "o")
    with pytest.raises(ValueError, match=r"2 files, 1 of them different"):
        Job(inputs=(path, path), output=tmp_path / "o")
    with pytest.raises(ValueError, match=r"a.jsonl: already there"):
        Job(inputs=(path,), output=path)
    with pytest.raises(ValueError, match=r"it is an input too"):
        Job(inputs=(path,), output=path, overwrite=True)
