"""Text and tokenizer are what the config names, or the config is told what is wrong with them."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from megatree.recipes.config import DataConfig
from megatree.recipes.data import datasets, load_text, load_tokenizer
from tests.recipes.tiny_run import SEQ, tiny_run, with_group


def test_the_held_out_part_is_neither_trained_on_nor_moved_by_the_seed(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path)
    train, valid = datasets(cfg)
    other_train, other_valid = datasets(with_group(cfg, "train", seed=5))
    assert valid is not None
    assert other_valid is not None
    assert valid.identity == other_valid.identity
    assert train.identity != other_train.identity
    text = load_text(cfg.data)
    per_document = [len(text.tokenizer.encode(one).ids) + 1 for one in text.texts]
    assert len(train.tokens) + len(valid.tokens) == sum(per_document)
    assert len(valid) == pytest.approx(0.2 * sum(per_document) / SEQ, abs=2)


def test_nothing_is_held_out_where_nothing_is_asked(tmp_path: Path) -> None:
    cfg = with_group(tiny_run(tmp_path, eval_every=0), "data", valid_fraction=0.0)
    assert datasets(cfg)[1] is None


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.jsonl.xz"])
def test_a_text_is_read_in_each_form(tmp_path: Path, name: str) -> None:
    words = "Caf\u00e9 \u2028 and tea.\n"
    raw = (words if ".txt" in name else json.dumps({"text": words}) + "\n").encode()
    (tmp_path / name).write_bytes(lzma.compress(raw) if name.endswith(".xz") else raw)
    cfg = DataConfig(text=str(tmp_path / name), tokenizer="demo")
    assert load_text(cfg).texts == (words,)


def test_a_raw_line_separator_inside_json_ends_no_line(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 unescaped; `str.splitlines` cuts there."""
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\u0085three"}\n', encoding="utf-8")
    cfg = DataConfig(text=str(tmp_path / "a.jsonl"), tokenizer="demo")
    assert load_text(cfg).texts == ("one\u2028two\u0085three",)


def test_a_folder_of_vocabulary_and_merges_is_a_tokenizer(shared: Path) -> None:
    folder = shared / "data" / "tokenizers" / "gpt2"
    cfg = DataConfig(text="demo", tokenizer=str(folder))
    tokenizer = load_tokenizer(cfg)
    assert tokenizer.get_vocab_size() == 50257
    ids = tokenizer.encode("Hello world, it's 2 a.m.").ids
    assert ids[:2] == [15496, 995]
    assert tokenizer.decode(ids) == "Hello world, it's 2 a.m."


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("data", {"text": ""}, r"^data.text: this recipe brings no text\. Set data.text to a"),
        ("data", {"text": "absent.txt"}, r"No such file or directory: 'absent.txt'"),
        ("data", {"tokenizer": ""}, r"^data.tokenizer: '' is no file\. Give a tokenizer.json"),
        ("data", {"tokenizer": __file__}, r"^data.tokenizer: .*test_data.py is no tokenizer \("),
        ("data", {"eod": "<|eod|>"}, r"^data.eod: the tokenizer has no entry '<|eod|>'"),
        (
            "model",
            {"vocab_size": 500},
            r"^model.vocab_size: 500, but the tokenizer has 512 entries\. Set model.vocab_size",
        ),
        (
            "train",
            {"eval_samples": 1000},
            r"^train.eval_samples: 1000, but \d+ samples are held out\. "
            r"Set train.eval_samples to at most \d*[02468],",
        ),
        ("model", {"seq_length": 4096}, r"tokens hold no sample of 4096 \+ 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, group: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        datasets(with_group(tiny_run(tmp_path), group, **changes))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n', encoding="utf-8")
    cfg = DataConfig(text=str(tmp_path / "bad.jsonl"), tokenizer="demo")
    with pytest.raises(ValueError, match=r'bad.jsonl:2: no JSON object with a "text"'):
        load_text(cfg)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is no UTF-8 text \(.*\)\. Convert it"):
        load_text(DataConfig(text=str(tmp_path / "latin.txt"), tokenizer="demo"))
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.csv is neither .jsonl nor .txt"):
        load_text(DataConfig(text=str(tmp_path / "a.csv"), tokenizer="demo"))
