"""Fill-in-the-middle: the same tokens in another order, within each document."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import Codec, FillInMiddle, GPTOptions, gpt_dataset

PRE, MID, SUF, EOD = 100, 101, 102, 0
ROWS = st.lists(st.integers(0, 9), min_size=24, max_size=24)


def fim(*, rate: float = 1.0, **options: Any) -> FillInMiddle:
    return FillInMiddle(prefix=PRE, middle=MID, suffix=SUF, eod=EOD, rate=rate, **options)


def restored(piece: list[int]) -> list[int]:
    """Return prefix + middle + suffix of a rearranged document."""
    if not piece or piece[0] != PRE:
        return piece
    s, m = piece.index(SUF), piece.index(MID)
    if s == 1:  # suffix first: the prefix and the middle follow as one text
        return piece[m + 1 :] + piece[2:m]
    return piece[1:s] + piece[m + 1 :] + piece[s + 1 : m]


def documents(row: list[int]) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for token in row:
        if token == EOD:
            out.append([])
        else:
            out[-1].append(token)
    return out


@hypothesis.given(row=ROWS, sample=st.integers(0, 2**40), spm_rate=st.sampled_from([0.0, 0.5, 1.0]))
def test_each_document_keeps_its_place_its_length_and_its_tokens(row, sample, spm_rate) -> None:
    text = np.array([row])
    out = fim(spm_rate=spm_rate)(text, np.array([sample]))
    np.testing.assert_array_equal(out == EOD, text == EOD)
    assert out.shape == text.shape
    for before, after in zip(documents(row), documents(out[0].tolist()), strict=True):
        whole = restored(after)
        assert whole == before[: len(whole)]
        assert len(whole) in (len(before), len(before) - 3)  # three marks push out the end


def test_the_rate_and_the_order_are_drawn_per_document_and_sample() -> None:
    text = np.tile(np.arange(1, 51), (2000, 1))
    out = fim(rate=0.5, spm_rate=0.25)(text, np.arange(2000))
    changed = out[:, 0] == PRE
    assert abs(changed.mean() - 0.5 * 0.96) < 0.05  # few suffixes are too short to give room
    assert abs((out[changed, 1] == SUF).mean() - 0.25) < 0.05
    again = fim(rate=0.5, spm_rate=0.25)(text[7:9], np.array([7, 8]))
    np.testing.assert_array_equal(again, out[7:9])


def test_cuts_between_characters_spell_the_same_text() -> None:
    words = {1: "ab", 2: "a", 3: "b", 4: "c", 5: "abc"}
    ids = {word: token for token, word in words.items()}

    def encode(text: str) -> list[int]:
        out = []
        while text:
            word = max((w for w in ids if text.startswith(w)), key=len)
            out.append(ids[word])
            text = text[len(word) :]
        return out

    codec = Codec(decode=lambda tokens: "".join(words[t] for t in tokens), encode=encode)
    row = np.array([[5, 1, 4, 5, 5, 1, 4, 5, 1, 4, 5, 5]])
    spelled = codec.decode(row[0].tolist())
    changed = 0
    for sample in range(50):
        (out,) = fim(codec=codec, spm_rate=0.0)(row, np.array([sample]))
        tokens = [t for t in out.tolist() if t >= 0]
        if tokens[0] == PRE:
            changed += 1
            assert spelled.startswith(codec.decode(restored(tokens)))
    assert changed > 25


def test_a_dataset_with_fim_learns_the_marks_and_hides_what_is_padding(write_pair) -> None:
    source = write_pair([40, 40])
    options = GPTOptions(seq=16, eod=39)
    marks = FillInMiddle(prefix=PRE, middle=MID, suffix=SUF, eod=39, rate=1.0)
    dataset = gpt_dataset(source, (0, 2), options, num_samples=None, fim=marks)
    rows = dataset.rows(np.arange(len(dataset)))
    np.testing.assert_array_equal(rows["tokens"][:, 1:], rows["labels"][:, :-1])
    assert (rows["tokens"] == PRE).any()
    plain = gpt_dataset(source, (0, 2), options, num_samples=None)
    assert dataset.identity != plain.identity


def test_a_rate_that_is_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rate 1\.5 is no share"):
        fim(rate=1.5)
    with pytest.raises(ValueError, match=r"spm_rate -0\.1 is no share"):
        fim(spm_rate=-0.1)
