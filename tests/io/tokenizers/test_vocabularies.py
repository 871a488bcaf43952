"""Each kind of vocabulary gives the ids of the library, or the table, that defines it."""

import base64
import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from tokenizers import BertWordPieceTokenizer

from megatree.io.data.demo import load_demo
from megatree.io.tokenizers import TokenizerSpec, load_tokenizer
from megatree.io.tokenizers.tik_token import PATTERNS

ODD = "Hello  world! don't caf\u00e9 \u4e2d\u6587 \U0001f600 12345\r\n\n\t x_y  "
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # its paper's code
)


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data" / "tokenizers"


@pytest.fixture(scope="module")
def text(shared: Path) -> str:
    with open(shared / "data" / "corpus" / "austen.jsonl", encoding="utf-8") as file:
        return json.loads(next(file))["text"]


def gpt2_ranks(folder: Path) -> dict[bytes, int]:
    """The table of GPT-2 as bytes -> rank: its letters stand for bytes."""
    entries = json.loads((folder / "gpt2" / "vocab.json").read_text(encoding="utf-8"))
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain}
    byte_of |= {chr(256 + number): byte for number, byte in enumerate(others)}
    return {
        bytes(byte_of[letter] for letter in spelling): token
        for spelling, token in entries.items()
        if spelling != "<|endoftext|>"
    }


def test_gpt2_has_the_ids_of_tiktoken(folder: Path, text: str) -> None:
    """An independent implementation of the same table."""
    oracle = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=gpt2_ranks(folder), special_tokens={}
    )
    ours = load_tokenizer(TokenizerSpec(kind="gpt2", path=folder / "gpt2"))
    assert ours.vocab_size == 50257
    assert ours.special.eod == 50256
    for one in (text, ODD, ""):
        assert ours.encode(one) == oracle.encode_ordinary(one)
        assert ours.decode(ours.encode(one)) == one


def test_bert_has_the_ids_of_the_reference_and_what_megatron_appends(
    folder: Path, text: str
) -> None:
    vocab = folder / "bert-base-uncased" / "vocab.txt"
    oracle = BertWordPieceTokenizer(str(vocab))
    ours = load_tokenizer(TokenizerSpec(kind="bert", path=vocab, extra_ids=100))
    for one in (text, ODD):
        assert ours.encode(one) == oracle.encode(one, add_special_tokens=False).ids
    special = ours.special
    assert (special.bos, special.eos, special.eod) == (30522, 30523, 30523)
    assert (special.pad, special.cls, special.sep, special.mask) == (0, 101, 102, 103)
    assert special.sentinels == tuple(range(30524, 30624))
    assert ours.vocab_size == 30624
    assert ours.piece(2075) == "##ing"


def test_bert_keeps_case_when_told(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nA\na\n##b\n", encoding="utf-8")
    cased = load_tokenizer(TokenizerSpec(kind="bert", path=vocab, lowercase=False))
    uncased = load_tokenizer(TokenizerSpec(kind="bert", path=vocab))
    assert cased.encode("Ab a") == [5, 7, 6]
    assert uncased.encode("Ab a") == [6, 7, 6]
    assert cased.identity != uncased.identity


@pytest.mark.parametrize(
    "model", ["mistral-v1/tokenizer.model", "sp-unigram-1000/test_model.model"]
)
def test_sentencepiece_has_the_ids_of_the_library(folder: Path, text: str, model: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / model))
    ours = load_tokenizer(TokenizerSpec(kind="sentencepiece", path=folder / model))
    for one in (text, ODD, "", "  two", "<s> a </s>"):
        assert ours.encode(one) == oracle.encode(one)
        assert ours.decode(ours.encode(one)) == oracle.decode(oracle.encode(one))
    assert ours.vocab_size == oracle.get_piece_size()
    assert (ours.special.bos, ours.special.eos, ours.special.eod) == (1, 2, 2)


def test_t5_appends_in_the_order_of_megatron_or_of_hugging_face(folder: Path) -> None:
    path = folder / "c4-sp-32k"
    appended = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
    megatron = load_tokenizer(
        TokenizerSpec(kind="sentencepiece", path=path, append=appended, extra_ids=100)
    )
    size = megatron.vocab_size - 104
    special = megatron.special
    assert (special.cls, special.sep, special.eod, special.mask) == tuple(range(size, size + 4))
    assert special.sentinels == tuple(range(size + 4, size + 104))
    hugging_face = load_tokenizer(
        TokenizerSpec(kind="sentencepiece", path=path, extra_ids=100, extra_ids_order="descending")
    )
    assert hugging_face.special.sentinels == tuple(range(size + 99, size - 1, -1))
    assert hugging_face.special.eod == hugging_face.special.eos
    marked = megatron.encode_marked("a<extra_id_1>b")
    assert marked == [*megatron.encode("a"), size + 5, *megatron.encode("b")]
    assert megatron.decode(marked) == "a<extra_id_1>b"
    assert size + 5 not in megatron.encode("a<extra_id_1>b")


def test_a_tokenizer_json_and_its_sentencepiece_model_agree(shared: Path, text: str) -> None:
    path = shared / "data" / "weights" / "stories260K" / "hf"
    fast = load_tokenizer(TokenizerSpec(kind="hf", path=path))
    oracle = load_tokenizer(TokenizerSpec(kind="sentencepiece", path=path))
    assert (fast.special.eod, fast.special.bos, fast.vocab_size) == (2, 1, 512)
    for paragraph in text.split("\n\n"):
        assert fast.encode(paragraph) == oracle.encode(paragraph)


def test_truncation_and_padding_of_a_published_file_are_switched_off(tmp_path: Path) -> None:
    """Files published with sentence encoders cut at 128 tokens; a document became its start."""
    demo = load_demo().tokenizer.backend
    demo.enable_truncation(4)
    demo.enable_padding(length=9)
    demo.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(TokenizerSpec(kind="hf", path=tmp_path, eod="<|endoftext|>"))
    assert ours.decode(ours.encode("a b c d e f")) == "a b c d e f"
    assert len(ours.encode("a")) == 1
    with pytest.raises(ValueError, match=r"its 512 entries lack '</s>', named as eod"):
        load_tokenizer(TokenizerSpec(kind="hf", path=tmp_path, eod="</s>"))


@pytest.mark.parametrize("pattern", ["v1", "v2", "cl100k"])
def test_tiktoken_files_of_both_formats_have_the_ids_of_the_library(
    folder: Path, text: str, tmp_path: Path, pattern: str
) -> None:
    ranks = {token: rank for token, rank in gpt2_ranks(folder).items() if rank < 2000}
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "t.tiktoken").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    oracle = tiktoken.Encoding(
        "x", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
    )
    leading = load_tokenizer(
        TokenizerSpec(kind="tiktoken", path=tmp_path / "t.json", pattern=pattern)
    )
    trailing = load_tokenizer(
        TokenizerSpec(
            kind="tiktoken",
            path=tmp_path / "t.tiktoken",
            pattern=pattern,
            special=("<|endoftext|>",),
        )
    )
    for one in (text, ODD):
        ids = oracle.encode_ordinary(one)
        assert trailing.encode(one) == ids
        assert leading.encode(one) == [1000 + token for token in ids]
        assert leading.decode(leading.encode(one)) == trailing.decode(ids) == one
    assert (leading.special.eod, leading.special.bos, leading.vocab_size) == (2, 1, 3000)
    assert (trailing.special.eod, trailing.vocab_size) == (2000, 2001)
    assert leading.encode_marked("a</s>") == [*leading.encode("a"), 2]
    assert trailing.encode_marked("a<|endoftext|>") == [*trailing.encode("a"), 2000]
