"""The shipped text and tokenizer: what they are, and that they can be made again."""

import hashlib
import json
import lzma
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import Demo, encode_documents, load_demo, train_byte_bpe, unigram_entropy

SHIPPED = Path(__file__).parents[2] / "megatree" / "demo_data"
DEMO = load_demo()


@pytest.fixture(scope="module")
def demo() -> Demo:
    return DEMO


def test_the_text_is_six_novels_in_269_chapters(demo: Demo) -> None:
    assert len(demo.texts) == len(demo.titles) == 269
    assert len({title.split(",")[0] for title in demo.titles}) == 6
    assert demo.texts[0].startswith("Emma Woodhouse, handsome, clever, and rich")
    digest = hashlib.sha256("\0".join(demo.texts).encode()).hexdigest()
    assert digest == "2def8a94f9591c488697acc5856513151ddfc352f018af604b4dd9abdaf4eecd"


def test_the_text_is_the_shared_corpus_byte_for_byte(shared: Path) -> None:
    corpus = (shared / "data" / "corpus" / "austen.jsonl").read_bytes()
    assert lzma.decompress((SHIPPED / "austen.jsonl.xz").read_bytes()) == corpus


def test_the_tokenizer_has_512_entries_and_comes_out_the_same_when_trained_again(
    demo: Demo,
) -> None:
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    again = json.loads(train_byte_bpe(demo.texts, 512).to_str())["model"]
    assert demo.tokenizer.vocab_size == len(shipped["vocab"]) == 512
    assert again["vocab"] == shipped["vocab"]
    assert again["merges"] == shipped["merges"]


def test_unigram_entropy_of_the_text_is_5_3_nats(demo: Demo) -> None:
    """The demo prints this number; a model that learns nothing but frequencies ends there."""
    tokens = encode_documents(demo.texts, demo.tokenizer).tokens
    assert tokens.size == 1_796_166
    assert unigram_entropy(tokens) == pytest.approx(5.29997, abs=1e-5)


def test_the_text_survives_encoding(demo: Demo) -> None:
    for text, encoded in zip(demo.texts, demo.tokenizer.encode_batch(demo.texts), strict=True):
        assert demo.tokenizer.decode(encoded) == text


@hypothesis.given(st.text())
@hypothesis.example("<|endoftext|> \n\t  \u00e9 \u4e2d \U0001f600 \x00")
def test_any_text_survives_encoding_and_never_contains_eod(text: str) -> None:
    """The end marker written out in a text once became the marker itself."""
    ids = DEMO.tokenizer.encode(text)
    assert DEMO.tokenizer.special.need("eod") not in ids
    assert DEMO.tokenizer.decode(ids) == text


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size 256 does not hold 256 bytes .* at least 257"):
        train_byte_bpe(["text"], 256)


def test_a_text_too_short_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the texts give 260 of 512 entries.*lower .* to 260"):
        train_byte_bpe(["abcd"], 512)


def test_entropy_is_that_of_the_frequencies() -> None:
    assert unigram_entropy(np.array([7, 7, 7])) == 0
    p = np.array([0.5, 0.25, 0.25])
    assert unigram_entropy(np.array([0, 0, 5, 9])) == pytest.approx(-(p * np.log(p)).sum())
    with pytest.raises(ValueError, match="0 tokens have no frequencies"):
        unigram_entropy(np.array([], int))
