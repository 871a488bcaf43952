"""Packing: every sequence whole and once, and boundaries that attention can see."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import (
    Corpus,
    IndexedFile,
    IndexedWriter,
    pack,
    packed_dataset,
    packed_datasets,
)

LENGTHS = st.lists(st.integers(0, 12), max_size=30)


@hypothesis.given(lengths=LENGTHS, capacity=st.integers(12, 40))
def test_every_item_is_in_one_row_and_no_row_is_over_full(lengths, capacity: int) -> None:
    items, bounds = pack(np.array(lengths, np.int64), capacity)
    assert sorted(items.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in items[a:b]) for a, b in itertools.pairwise(bounds)]
    assert all(total <= capacity for total in filled)
    # Two rows that would fit into one are never both left.
    half = [total for total in filled if 2 * total <= capacity]
    assert len(half) <= 1


def test_an_item_goes_into_the_fullest_row_that_has_room() -> None:
    items, bounds = pack(np.array([8, 6, 2]), 10)
    assert (items.tolist(), bounds.tolist()) == ([0, 2, 1], [0, 2, 3])


def test_packing_leaves_little_room() -> None:
    lengths = np.random.default_rng(1).integers(1, 2048, 5000)
    _, bounds = pack(lengths, 2048)
    assert lengths.sum() / ((len(bounds) - 1) * 2048) > 0.98


@hypothesis.settings(max_examples=30)
@hypothesis.given(lengths=LENGTHS.filter(lambda x: any(n > 1 for n in x)))
def test_rows_hold_whole_sequences_with_their_boundaries(counting, lengths) -> None:
    source = counting(lengths)
    dataset = packed_dataset(source, 12)
    rows = dataset.rows(np.arange(len(dataset)))
    learned = rows["weights"] == 1
    expected = [source[i][1:] for i in range(len(lengths)) if lengths[i] > 1]
    np.testing.assert_array_equal(np.sort(rows["labels"][learned]), np.concatenate(expected))
    assert dataset.dropped == sum(n < 2 for n in lengths)
    np.testing.assert_array_equal(rows["labels"][learned], rows["tokens"][learned] + 1)
    starts = np.cumsum([0, *lengths])
    document = np.searchsorted(starts, rows["tokens"], side="right") - 1
    np.testing.assert_array_equal(
        rows["positions"][learned], (rows["tokens"] - starts[document])[learned]
    )
    for row in range(len(dataset)):
        pieces = {
            (s, d)
            for s, d, ok in zip(rows["segments"][row], document[row], learned[row], strict=True)
            if ok
        }
        assert len(pieces) == len({s for s, _ in pieces}) == len({d for _, d in pieces})
        padded = rows["segments"][row][~learned[row]]
        assert set(padded.tolist()) <= {len(pieces)}


def test_bounds_take_a_part_and_foreign_ids_are_refused(counting) -> None:
    source = counting([5, 5, 5, 30])
    part = packed_dataset(source, 8, bounds=(1, 3), vocab_size=15)
    rows = part.rows(np.arange(len(part)))
    learned = np.sort(rows["labels"][rows["weights"] == 1])
    assert learned.tolist() == [6, 7, 8, 9, 11, 12, 13, 14]
    assert part.dropped == 0
    small = packed_dataset(source, 8, bounds=(1, 3), vocab_size=14)
    with pytest.raises(ValueError, match=r"counting: sequence 2 holds token 14, and .* has 14"):
        small.rows(np.arange(len(small)))


def test_packed_splits_are_shuffled_and_repeat_as_often_as_asked(write_pair) -> None:
    source = write_pair([5] * 40)
    corpus = Corpus(prefix=source.prefix, split="8,2")
    train, valid, test = packed_datasets(corpus, 8, seed=1, num_samples=(40, None, None))
    assert train is not None
    assert valid is not None
    assert test is None
    assert (len(train), len(valid)) == (40, 4)
    labels = [train.rows(np.arange(*part))["labels"].ravel() for part in ((0, 16), (16, 32))]
    assert np.sort(labels[0]).tolist() == np.sort(labels[1]).tolist(), "an epoch repeats none"
    assert labels[0].tolist() != labels[1].tolist()
    assert labels[0].max() < 160 <= valid.rows(np.arange(4))["labels"].min()


@pytest.mark.parametrize(("too_long", "count", "dropped"), [("drop", 1, 1), ("cut", 2, 0)])
def test_long_sequences_are_dropped_or_cut(write_pair, too_long, count, dropped) -> None:
    source = write_pair([20, 4])
    dataset = packed_dataset(source, 8, packing="single", too_long=too_long)
    assert (len(dataset), dataset.dropped) == (count, dropped)
    if too_long == "cut":
        row = dataset.rows(np.array([0]))
        assert row["labels"].tolist() == [list(range(1, 9))]


def test_a_long_sequence_is_refused_by_number(write_pair) -> None:
    source = write_pair([4, 20, 30])
    with pytest.raises(ValueError, match=r"sequence 1 has 20 tokens, and a row holds 9; 2 are"):
        packed_dataset(source, 8)
    with pytest.raises(ValueError, match="item 2 of 9 tokens does not fit a row of 8"):
        pack(np.array([1, 2, 9]), 8)


def test_flags_of_other_lengths_are_refused(tmp_path, write_pair) -> None:
    with IndexedWriter(tmp_path / "flags", "uint8") as writer:
        writer.add_document([[1, 1, 1]])
    with pytest.raises(ValueError, match="flags: their sequences differ in length"):
        packed_dataset(write_pair([4]), 8, learned=IndexedFile(tmp_path / "flags"))
