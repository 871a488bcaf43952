"""Order: no sample repeated or lost, whatever the batches, the ranks and the resumes."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import (
    Documents,
    GPTOptions,
    Stream,
    encode_documents,
    gpt_dataset,
    load_demo_tokenizer,
    sample_ids,
)


def dataset(*, num_tokens: int = 101, seq: int = 4, seed: int = 1) -> Stream:
    """Return samples of one document whose tokens count upwards."""
    source = Documents(
        tokens=np.arange(num_tokens, dtype=np.uint16), lengths=np.array([num_tokens], np.int32)
    )
    rows = gpt_dataset(source, (0, 1), GPTOptions(seq=seq), num_samples=None)
    return Stream(dataset=rows, seed=seed)


@hypothesis.given(
    num_samples=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40)
)
def test_every_epoch_deals_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    start = num_samples * epoch
    ids = sample_ids(np.arange(start, start + num_samples), num_samples, seed=seed)
    np.testing.assert_array_equal(np.sort(ids), np.arange(num_samples))


def test_order_depends_on_seed_and_epoch_and_has_no_trend() -> None:
    n = 10_000
    first, second = sample_ids(np.arange(2 * n), n, seed=1).reshape(2, n)
    other = sample_ids(np.arange(n), n, seed=2)
    for a, b in [(first, second), (first, other), (first, np.arange(n)), (first[1:], first[:-1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.04  # 4 standard deviations of n independent pairs


def test_orders_of_four_samples_are_drawn_evenly() -> None:
    """A weak key schedule or too small a domain leaves orders out, or prefers some."""
    epochs = sample_ids(np.arange(4 * 24_000), 4, seed=1).reshape(24_000, 4)
    counts = np.unique(epochs, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert np.abs(counts - 1000).max() < 4 * 1000**0.5  # 4 standard deviations


def test_order_is_frozen() -> None:
    """A changed order silently resumes old runs on samples they have seen."""
    assert sample_ids(range(12), 6, seed=1234).tolist() == [0, 5, 3, 4, 2, 1, 5, 1, 2, 3, 0, 4]
    assert sample_ids([0, 10**9, 10**15], 10**9 + 7, seed=2**64 - 1).tolist() == [
        28900829,
        967015688,
        34298152,
    ]


@hypothesis.given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_split_into_batches_deals_the_same_samples(cuts: list[int]) -> None:
    """Resume with another batch size: 25 samples an epoch, so 60 cross two epoch ends."""
    data = dataset()
    edges = [0, *sorted(cuts), 60]
    parts = [data.batch(lo, hi - lo) for lo, hi in itertools.pairwise(edges)]
    for name, whole in data.batch(0, 60).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_rows_of_the_ranks_make_up_the_global_batch(num_ranks: int) -> None:
    data, edges = dataset(), np.linspace(0, 24, num_ranks + 1).astype(int)
    parts = [data.batch(13, 24, rows=(int(lo), int(hi))) for lo, hi in itertools.pairwise(edges)]
    for name, whole in data.batch(13, 24).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)


def test_each_token_but_the_first_is_a_label_once_per_epoch() -> None:
    data = dataset(num_tokens=101, seq=4)
    assert len(data.dataset) == 25
    batch = data.batch(25, 25)
    np.testing.assert_array_equal(np.sort(batch["labels"].ravel()), np.arange(1, 101))
    np.testing.assert_array_equal(batch["tokens"] + 1, batch["labels"])
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int64
    np.testing.assert_array_equal(batch["weights"], np.ones((25, 4), np.float32))


def test_identity_changes_with_all_that_decides_the_samples() -> None:
    changed = [dataset(), dataset(seq=5), dataset(seed=2), dataset(num_tokens=102)]
    assert len({data.identity for data in changed}) == 4
    assert dataset().identity == dataset().identity


def test_documents_are_closed_by_eod_and_kept_whole() -> None:
    tokenizer = load_demo_tokenizer()
    texts = ["the cat", "", "on"]
    documents = encode_documents(texts, tokenizer)
    assert len(documents) == 3
    for document, text in enumerate(texts):
        *ids, last = documents[document].tolist()
        assert last == tokenizer.special.eod
        assert tokenizer.decode(ids) == text
    assert documents.tokens.dtype == np.uint16
    places = documents.starts(np.arange(3))
    assert places.tolist() == [0, *np.cumsum(documents.lengths)[:-1].tolist()]
    assert len({documents.identity, encode_documents(texts[::-1], tokenizer).identity}) == 2


def test_the_stored_order_comes_first_and_then_every_sample_again() -> None:
    """Megatron's order for as long as it has one; a run that goes on longer repeats none early."""
    source = dataset().dataset
    data = Stream(dataset=source, seed=3, stored_first=True)
    size = len(source)
    first, second, third = (data.batch(size * epoch, size)["labels"] for epoch in range(3))
    np.testing.assert_array_equal(first, source.rows(np.arange(size))["labels"])
    for other in (second, third):
        assert (other != first).any()
        np.testing.assert_array_equal(np.sort(other.ravel()), np.sort(first.ravel()))
    assert (second != third).any()
    across = data.batch(size - 2, 4)["labels"]
    np.testing.assert_array_equal(across, np.concatenate([first[-2:], second[:2]]))
    assert data.identity != Stream(dataset=source, seed=3).identity


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: dataset(num_tokens=4, seq=4), "a dataset of 0 samples never ends an epoch"),
        (lambda: dataset(seq=0), "seq 0 predicts nothing"),
        (lambda: dataset(seed=-1).batch(0, 1), "seed -1 is outside"),
        (lambda: dataset().batch(-1, 2), "after -1 do not exist"),
        (lambda: dataset().batch(0, 8, rows=(3, 9)), r"rows \(3, 9\) of 8 samples"),
        (lambda: sample_ids([0], 0, seed=1), "0 samples have no order"),
        (lambda: sample_ids([3, -2], 5, seed=1), "position -2 is negative"),
    ],
)
def test_what_cannot_be_is_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
