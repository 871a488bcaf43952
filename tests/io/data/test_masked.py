"""BERT and T5: mappings and samples equal to Megatron's, and no way to loop or to run out."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import (
    BertOptions,
    Corpus,
    Masking,
    T5Options,
    bert_dataset,
    bert_datasets,
    build_masked_index,
    t5_dataset,
    t5_datasets,
)
from megatree.io.data.mersenne import draws64, shuffled
from megatree.io.data.splits import SPLITS

VOCAB, BOS, EOS, SENTINELS = 30522, 30522, 30523, tuple(range(30524, 30624))


@pytest.fixture(scope="module")
def continues(shared: Path) -> np.ndarray:
    path = shared / "data" / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    if not path.is_file():
        pytest.skip(f"missing data: {path} is no file. Copy the tokenizers there.")
    words = path.read_text(encoding="utf-8").split("\n")[:VOCAB]
    return np.array([word.startswith("##") for word in words] + [False] * 102)


def masking_of(told: dict, continues: np.ndarray) -> Masking:
    geometric, longer = (
        told["masking_use_geometric_distribution"],
        told["masking_use_longer_ngrams"],
    )
    return Masking(
        probability=told["masking_probability"],
        max_ngram=told["masking_max_ngram"],
        ngrams="geometric" if geometric else "long" if longer else "short",
        continues=continues if told["masking_do_full_word"] else None,
    )


def splits_of(goldens, told: dict, build: Callable[..., Any], options: Any) -> list:
    """Return (name, dataset) of each split that Megatron made."""
    corpus = Corpus(prefix=str(goldens.pair(told["corpus"])), split=told["split"])
    datasets = build(corpus, options, num_samples=tuple(told["num_samples"]))
    made = [(name, d) for name, d in zip(SPLITS, datasets, strict=True) if d is not None]
    assert [name for name, _ in made] == list(told["result"])
    return made


@pytest.mark.parametrize("case", ["bert1", "bert2"])
def test_bert_samples_equal_those_of_megatron(goldens, continues, case: str) -> None:
    told, arrays = goldens.parameters["masked"][case], goldens.arrays(f"bert/{case}")
    options = BertOptions(
        seq=told["sequence_length"],
        cls=101,
        sep=102,
        mask=103,
        pad=0,
        random_ids=np.arange(VOCAB + 2),
        masking=masking_of(told, continues),
        sentences="pair" if told["classification_head"] else "single",
        short_probability=told["short_sequence_probability"],
        seed=told["random_seed"],
    )
    for split, dataset in splits_of(goldens, told, bert_datasets, options):
        expected = arrays[f"{split}.sample_index"]
        assert dataset.index.dtype == expected.dtype
        np.testing.assert_array_equal(dataset.index, expected)
        ids = arrays[f"{split}.sample_ids"]
        rows = dataset.rows(ids)
        for name, array in [
            ("text", rows["tokens"]),
            ("types", rows["types"]),
            ("labels", np.where(rows["weights"] == 1, rows["labels"], -1)),
            ("loss_mask", rows["weights"]),
            ("padding_mask", rows["padding"]),
            ("is_random", rows["swapped"][:, 0]),
            ("truncated", np.array([dataset.sample(i).truncated for i in ids.tolist()])),
        ]:
            np.testing.assert_array_equal(array, arrays[f"{split}.{name}"], err_msg=name)


@pytest.mark.parametrize("case", ["t5_1", "t5_2"])
def test_t5_samples_equal_those_of_megatron(goldens, continues, case: str) -> None:
    told, arrays = goldens.parameters["masked"][case], goldens.arrays(f"t5/{case}")
    options = T5Options(
        seq=told["sequence_length"],
        decoder_seq=told["sequence_length_decoder"],
        bos=BOS,
        eos=EOS,
        pad=0,
        sentinels=SENTINELS,
        special=(101, 102),
        masking=masking_of(told, continues),
        short_probability=told["short_sequence_probability"],
        seed=told["random_seed"],
    )
    for split, dataset in splits_of(goldens, told, t5_datasets, options):
        np.testing.assert_array_equal(dataset.index, arrays[f"{split}.sample_index"])
        ids = arrays[f"{split}.sample_ids"]
        rows = dataset.rows(ids)
        for name, array in [
            ("text_enc", rows["encoder_tokens"]),
            ("text_dec", rows["tokens"]),
            ("labels", np.where(rows["weights"] == 1, rows["labels"], -1)),
            ("loss_mask", rows["weights"]),
            ("enc_mask", rows["encoder_padding"]),
            ("dec_mask", rows["padding"]),
            ("truncated", np.array([dataset.sample(i).truncated for i in ids.tolist()])),
        ]:
            np.testing.assert_array_equal(array, arrays[f"{split}.{name}"], err_msg=name)


def test_the_twister_gives_the_published_numbers() -> None:
    """The 10000th draw of the default seed is fixed by the C++ standard."""
    blocks = draws64(5489)
    drawn = np.concatenate([next(blocks) for _ in range(33)])
    assert int(drawn[9999]) == 9981545732273789042
    assert sorted(shuffled(1000, 7).tolist()) == list(range(1000))


def scan(lengths, documents, *, longest: int, min_sentences: int) -> list[tuple[int, int]]:
    """Return the samples of one epoch without short ones, sentence by sentence."""
    out = []
    for first, last in itertools.pairwise(documents):
        inside = lengths[first:last]
        if last - first < min_sentences or (last - first > 1 and max(inside) > 512):
            continue
        start, size, count = first, 0, 0
        for sentence in range(first, last):
            size, count = size + lengths[sentence], count + 1
            remaining = last - sentence - 1
            full = size >= longest and remaining > 1 and count >= min_sentences
            if full or remaining == 0:
                out.append((start, sentence + 1))
                start, size, count = sentence + 1, 0, 0
    return out


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    documents=st.lists(st.lists(st.sampled_from([0, 1, 2, 5, 9, 30, 600]), max_size=9), max_size=6),
    longest=st.integers(2, 40),
    min_sentences=st.integers(1, 2),
)
def test_the_mapping_is_that_of_a_scan(documents, longest, min_sentences) -> None:
    lengths = [n for document in documents for n in document]
    bounds = np.cumsum([0, *(len(d) for d in documents)])
    index = build_masked_index(
        np.array(lengths, np.int32),
        bounds,
        longest=longest,
        min_sentences=min_sentences,
        short_probability=0.0,
        num_samples=None,
        seed=5,
    )
    expected = scan(lengths, bounds.tolist(), longest=longest, min_sentences=min_sentences)
    assert sorted(map(tuple, index[:, :2].tolist())) == expected
    assert set(index[:, 2].tolist()) <= {longest}


def test_samples_of_no_usable_document_are_refused_at_once(write_pair) -> None:
    """Megatron would go on for 2**31 - 2 epochs."""
    source = write_pair([600, 3, 5], documents=[2, 1, 0])
    options = BertOptions(seq=16, cls=1, sep=2, mask=3, pad=0, random_ids=np.arange(9))
    with pytest.raises(ValueError, match=r"/pair\[0:3\]: .*none of 3 documents has 2 or more"):
        bert_dataset(source, (0, 3), options, num_samples=10)
    assert len(bert_dataset(source, (0, 3), options, num_samples=0)) == 0


@pytest.mark.parametrize(("sentinels", "decoder_seq"), [(2, 64), (100, 9)])
def test_t5_spans_past_the_sentinels_or_the_decoder_stay_in_the_text(
    write_pair, sentinels: int, decoder_seq: int
) -> None:
    """Megatron ends a run with an IndexError or an assertion at such a sample."""
    source = write_pair([60] * 8)
    options = T5Options(
        seq=62,
        decoder_seq=decoder_seq,
        bos=1000,
        eos=1001,
        pad=0,
        sentinels=tuple(range(2000, 2000 + sentinels)),
        masking=Masking(probability=0.5, max_ngram=2),
    )
    dataset = t5_dataset(source, (0, 8), options, num_samples=16)
    for number in range(len(dataset)):
        sample = dataset.sample(number)
        assert len(sample.decoder) == len(sample.labels) <= decoder_seq
        used = [token for token in sample.encoder if token >= 2000]
        assert used == list(range(2000, 2000 + len(used)))
        assert 0 < len(used) <= sentinels
        spans: dict[int, list[int]] = {}
        for token in sample.decoder[1:]:
            if token >= 2000:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        text = [t for token in sample.encoder for t in spans.get(token, [token])]
        assert text == list(range(text[0], text[0] + len(text)))


def test_hidden_words_depend_on_seed_and_sample_only(write_pair) -> None:
    source = write_pair([9] * 40, documents=[4] * 10)

    def dataset(seed: int = 1, **options):
        made = BertOptions(
            seq=32,
            cls=1001,
            sep=1002,
            mask=1003,
            pad=0,
            random_ids=np.arange(9),
            seed=seed,
            **options,
        )
        return bert_dataset(source, (0, 10), made, num_samples=20)

    a, b = dataset(), dataset()
    b.rows(np.arange(7))
    for name, array in a.rows(np.array([5, 3])).items():
        np.testing.assert_array_equal(array, b.rows(np.array([5, 3]))[name])
    assert (a.rows(np.arange(20))["tokens"] != dataset(2).rows(np.arange(20))["tokens"]).any()
    assert a.identity == b.identity
    others = [dataset(2), dataset(sentences="single"), dataset(masking=Masking(probability=0.2))]
    assert len({d.identity for d in others} | {a.identity}) == 4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Masking(probability=0.0), "probability 0.0 and max_ngram 3 hide nothing"),
        (lambda: Masking(max_ngram=0), "max_ngram 0"),
        (
            lambda: BertOptions(seq=4, cls=0, sep=1, mask=2, pad=3, random_ids=np.arange(3)),
            "seq 4 holds no two tokens",
        ),
        (
            lambda: T5Options(seq=9, decoder_seq=9, bos=0, eos=1, pad=2, sentinels=()),
            "0 sentinels hold no span",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
