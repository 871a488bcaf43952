"""Laws that every tokenizer keeps, and what is refused with a sentence."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import hypothesis
import hypothesis.strategies as st
import pytest

from megatree.io.data.demo import load_demo
from megatree.io.tokenizers import (
    ByteTokenizer,
    NullTokenizer,
    Special,
    Tokenizer,
    TokenizerSpec,
    identity_beside,
    load_tokenizer,
    read_beside,
    require_tokenizer,
    tokenizer_facts,
    train_tokenizer,
    write_beside,
)
from megatree.io.tokenizers.gpt2 import load_gpt2
from megatree.io.tokenizers.spec import Kind
from megatree.io.tokenizers.train import Algorithm

TEXTS = [text[:20_000] for text in load_demo().texts[:3]]
ALGORITHMS = get_args(Algorithm)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("trained")
    made = {
        name: train_tokenizer(lambda: TEXTS, folder / name, algorithm=name, vocab_size=400)[1]
        for name in ALGORITHMS
    }
    gpt2 = load_tokenizer(TokenizerSpec(kind="gpt2", path=folder / "byte-bpe"))
    return {**made, "gpt2": gpt2, "bytes": ByteTokenizer()}


KINDS = [*ALGORITHMS, "gpt2", "bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_lie_in_the_vocabulary_and_batches_equal_single_texts(
    trained: dict[str, Tokenizer], kind: str
) -> None:
    ours = trained[kind]
    texts = [*TEXTS, "", "\u4e2d \U0001f600 \x00"]
    batch = ours.encode_batch(texts)
    assert batch == [ours.encode(text) for text in texts]
    assert all(0 <= token < ours.vocab_size for ids in batch for token in ids)
    assert batch[3] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_spelled_in_a_text_is_text(
    trained: dict[str, Tokenizer], kind: str
) -> None:
    """A document that quotes the end marker must not end there."""
    ours = trained[kind]
    spelled = [ours.piece(token) for token in ours.special.named().values()]
    special = set(ours.special.named().values()) - {ours.special.unk}
    text = f"a {' b '.join(spelled)} c"
    assert not special & set(ours.encode(text))
    assert special <= set(ours.encode_marked(text))


@pytest.mark.parametrize("kind", ["byte-bpe", "gpt2", "bytes"])
@hypothesis.given(text=st.text())
@hypothesis.settings(
    max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_text_survives_a_tokenizer_of_bytes(
    trained: dict[str, Tokenizer], kind: str, text: str
) -> None:
    assert trained[kind].decode(trained[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", [-1, 100_000])
def test_an_id_outside_the_vocabulary_is_refused(
    trained: dict[str, Tokenizer], kind: str, outside: int
) -> None:
    """The tokenizers library drops such an id without a word."""
    with pytest.raises(ValueError, match=rf"id {outside} at position 1 is outside the vocabulary"):
        trained[kind].decode([0, outside])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_again_gives_the_same_vocabulary(
    trained: dict[str, Tokenizer], algorithm: Algorithm, tmp_path: Path
) -> None:
    """The order of a hash table decided WordPiece ids."""
    _, again = train_tokenizer(lambda: TEXTS, tmp_path, algorithm=algorithm, vocab_size=400)
    assert again.identity == trained[algorithm].identity
    with pytest.raises(ValueError, match=r"already there. Name another folder"):
        train_tokenizer(lambda: TEXTS, tmp_path, algorithm=algorithm, vocab_size=400)


def test_identities_differ_with_the_vocabulary_and_not_with_the_place(
    trained: dict[str, Tokenizer], tmp_path: Path
) -> None:
    assert len({one.identity for one in trained.values()}) == len(trained)
    _, other = train_tokenizer(lambda: TEXTS, tmp_path, algorithm="byte-bpe", vocab_size=399)
    assert other.identity != trained["byte-bpe"].identity
    shutil.copytree(tmp_path, tmp_path / "copy")
    copy = load_tokenizer(TokenizerSpec(kind="hf", path=tmp_path / "copy"))
    assert copy.identity == other.identity
    renamed = load_tokenizer(TokenizerSpec(kind="hf", path=tmp_path, eod="a"))
    assert renamed.identity != other.identity


def test_the_end_of_document_of_the_null_tokenizer_is_what_was_asked_for() -> None:
    """Megatron's moved from vocab_size to vocab_size - 1, and the files with it."""
    assert NullTokenizer(vocab_size=1001, eod=1000).special.eod == 1000
    assert NullTokenizer(vocab_size=1000, eod=999).special.eod == 999
    with pytest.raises(ValueError, match=r"eod 1000 is outside a vocabulary of 1000.*1001"):
        NullTokenizer(vocab_size=1000, eod=1000)
    with pytest.raises(ValueError, match=r"'null' needs vocab_size and eod_id"):
        TokenizerSpec(kind="null", vocab_size=1000)


@pytest.mark.parametrize("word", ["10", "-1", "1_0", "x", "\u0663", "+1", "1.0", "9" * 5000])
def test_the_null_tokenizer_takes_ids_only(word: str) -> None:
    with pytest.raises(ValueError, match=r"is no id in 0..9"):
        NullTokenizer(vocab_size=10, eod=9).encode(f"1 {word}")


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken"])
def test_a_missing_package_is_named_with_its_extra(
    name: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "x.model"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"'{name}' is not installed.*megatree\[data\]"):
        load_tokenizer(TokenizerSpec(kind=name, path=path))


def test_a_missing_special_token_is_named() -> None:
    with pytest.raises(ValueError, match=r"no 'mask' token \(it has: eod, bos\)"):
        Special(eod=1, bos=2).need("mask")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gpt2"}, r"tokenizer.path: .* 'gpt2' needs it"),
        ({"kind": "bytes", "extra_ids": 3}, r"extra_ids: .* 'bytes' does not use it.*bert or sent"),
        ({"kind": "bert", "path": Path("x"), "merges": Path("y")}, r"merges: .*set kind to gpt2"),
        ({"kind": "bert", "path": Path("x"), "extra_ids": -1}, r"extra_ids: -1 is negative"),
    ],
)
def test_contradictory_specs_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerSpec(**fields)


def test_a_spec_survives_json() -> None:
    spec = TokenizerSpec(kind="sentencepiece", path=Path("a/b"), append=("<X>",), extra_ids=2)
    assert TokenizerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def _write(name: str, text: str) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("gpt2", _write("x", ""), r"has no vocab.json, which kind 'gpt2' reads"),
        ("gpt2", _write("vocab.json", "[1]"), r"merges.txt: there is no such file"),
        ("hf", _write("tokenizer.json", "{}"), r"it is no tokenizer.json"),
        ("bert", _write("vocab.txt", "a\nb\n"), r"2 entries, without \[PAD\], \[UNK\]"),
        ("bert", _write("vocab.txt", "a\nb\na\n"), r"vocab.txt:3: entry 'a' stands on line 1 too"),
        ("sentencepiece", _write("tokenizer.model", "abc"), r"no SentencePiece model \(3 bytes\)"),
        ("tiktoken", _write("tekken.json", "[3]"), r"no list of rank and token_bytes"),
        ("tiktoken", _write("tokenizer.tiktoken", "YQ== 0\n?"), r"tiktoken:2: .* is not base64"),
        ("tiktoken", _write("tokenizer.tiktoken", "YQ== 1\n"), r"its 1 ranks are not 0..0"),
        ("tiktoken", _write("tokenizer.tiktoken", "YQ== 0\n"), r"255 of 256 single bytes"),
    ],
)
def test_damaged_vocabularies_are_refused(
    kind: Kind, make: Callable[[Path], int], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(TokenizerSpec(kind=kind, path=tmp_path))


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ("[1]", "", r"no JSON object of spelling -> id"),
        ('{"a": 0, "b": 0}', "", r"2 entries share 1 ids"),
        ('{"a": 0}', "", r"255 of 256 bytes have no entry"),
        (None, "a b c", r"merges.txt:1: 'a b c' is not two pieces"),
        (None, "a zzz", r"does not fit"),
    ],
)
def test_damaged_gpt2_files_are_refused(
    vocab: str | None, merges: str, message: str, tmp_path: Path
) -> None:
    whole = load_demo().tokenizer.backend.get_vocab()
    (tmp_path / "vocab.json").write_text(vocab or json.dumps(whole), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_ids_of_one_tokenizer_are_refused_for_another(tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    assert read_beside(prefix) is None
    require_tokenizer(prefix, "sha256:anything")  # Megatron's pairs say nothing
    write_beside(prefix, {"tokenizer": tokenizer_facts(ByteTokenizer())})
    assert identity_beside(prefix) == ByteTokenizer().identity
    require_tokenizer(prefix, ByteTokenizer().identity)
    other = NullTokenizer(vocab_size=9, eod=8).identity
    with pytest.raises(ValueError, match=r"data: its ids come from tokenizer sha256:\w+, but the "):
        require_tokenizer(prefix, other)
    with pytest.raises(ValueError, match=r"but checkpoint 7 was made with"):
        require_tokenizer(prefix, other, of="checkpoint 7")
    (tmp_path / "data.meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.meta.json: it is no JSON"):
        read_beside(prefix)
