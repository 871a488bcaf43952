"""GPT rows: equal to Megatron's samples; every token learned once; boundaries where they are."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import (
    Corpus,
    GPTOptions,
    IndexedFile,
    IndexedWriter,
    MockSequences,
    gpt_dataset,
    gpt_datasets,
    split_bounds,
)
from megatree.io.data.splits import SPLITS

CASES = [f"g{number:02d}" for number in range(1, 14)]
LENGTHS = st.lists(st.integers(0, 9), min_size=3, max_size=14).filter(lambda x: sum(x) > 6)


def options_of(told: dict) -> GPTOptions:
    return GPTOptions(
        seq=told["seq_length"],
        seed=told["seed"],
        eod=50256,
        pad=told["pad_id"],
        positions="eod" if told["reset_position_ids"] else "row",
        segments="eod" if told["reset_attention_mask"] else "row",
        eod_loss=not told["eod_mask_loss"],
        next_token="shared" if told.get("add_extra_token_to_sequence", True) else "wrap",
        vocab_size=50257,
    )


@pytest.mark.parametrize("case", CASES)
def test_samples_equal_those_of_megatron(goldens, case: str) -> None:
    told, arrays = goldens.parameters["gpt"][case], goldens.arrays(f"gpt/{case}")
    datasets = gpt_datasets(
        Corpus(prefix=str(goldens.pair(told["corpus"])), split=told["split"]),
        options_of(told),
        num_samples=tuple(told["num_samples"]),
        keep_partial=not told.get("drop_last_partial_validation_sequence", True),
    )
    compared = 0
    for split, dataset in zip(SPLITS, datasets, strict=True):
        assert (dataset is None) == (told["result"][split] is None)
        if dataset is None:
            continue
        assert len(dataset) == told["result"][split]["len"]
        ids = arrays[f"{split}.sample_ids"]
        if not len(ids):
            continue
        rows = dataset.rows(ids)
        for name in ("tokens", "labels"):
            np.testing.assert_array_equal(rows[name], arrays[f"{split}.{name}"])
        np.testing.assert_array_equal(rows["weights"], arrays[f"{split}.loss_mask"])
        shape = rows["tokens"].shape
        positions = rows.get("positions", np.broadcast_to(np.arange(shape[1]), shape))
        np.testing.assert_array_equal(positions, arrays[f"{split}.position_ids"])
        segments = rows.get("segments", np.zeros(shape, np.int64))
        same = segments[:, :, None] == segments[:, None, :]
        np.testing.assert_array_equal(same.argmax(2), arrays[f"{split}.attention_start"])
        compared += len(ids)
    assert compared > 20


@hypothesis.settings(max_examples=30)
@hypothesis.given(lengths=LENGTHS, seq=st.integers(1, 7))
def test_every_token_is_learned_once_per_epoch(counting, lengths, seq: int) -> None:
    """Up to the first of the stream, which is no label, and a tail shorter than a row."""
    source = counting(lengths)
    dataset = gpt_dataset(source, (0, len(lengths)), GPTOptions(seq=seq), num_samples=None)
    rows = dataset.rows(np.arange(len(dataset)))
    stream = np.concatenate([source[d] for d in dataset.index.documents.tolist()])
    learned = len(dataset) * seq
    assert sum(lengths) - 1 - seq < learned < sum(lengths)
    np.testing.assert_array_equal(np.sort(rows["labels"].ravel()), np.sort(stream[1 : learned + 1]))
    np.testing.assert_array_equal(np.sort(rows["tokens"].ravel()), np.sort(stream[:learned]))
    assert rows["weights"].sum() == learned


@hypothesis.settings(max_examples=30)
@hypothesis.given(lengths=LENGTHS, weights=st.tuples(*[st.integers(1, 9)] * 3))
def test_no_document_crosses_a_split(counting, lengths, weights) -> None:
    source = counting(lengths)
    bounds = [b for b in split_bounds(",".join(map(str, weights)), len(lengths)) if b]
    seen = []
    for lo, hi in bounds:
        dataset = gpt_dataset(source, (lo, hi), GPTOptions(seq=1), num_samples=None)
        rows = dataset.rows(np.arange(len(dataset)))
        seen.append({*rows["tokens"].ravel().tolist(), *rows["labels"].ravel().tolist()})
    ends = np.cumsum([0, *lengths])
    for (lo, hi), tokens in zip(bounds, seen, strict=True):
        assert tokens <= set(range(ends[lo], ends[hi]))
    assert not (seen[0] & seen[1])
    assert not (seen[1] & seen[2])
    assert not (seen[0] & seen[2])


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    columns=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    positions=st.sampled_from(["row", "eod", "document"]),
    segments=st.sampled_from(["row", "eod", "document"]),
    next_token=st.sampled_from(["shared", "wrap"]),
)
def test_columns_are_those_of_the_whole_rows(
    counting, columns, positions, segments, next_token
) -> None:
    """A rank of a cut sequence; its labels were shifted before the cut."""
    source = counting([3, 0, 5, 9, 1, 1, 4])
    options = GPTOptions(
        seq=8, eod=4, positions=positions, segments=segments, next_token=next_token, eod_loss=False
    )
    dataset = gpt_dataset(source, (0, 7), options, num_samples=3, keep_partial=True)
    ids = np.arange(len(dataset))
    part, whole = dataset.rows(ids, np.array(columns)), dataset.rows(ids)
    assert set(part) == set(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(part[name], array[:, columns])


def test_a_rank_of_a_cut_sequence_reads_its_columns_only(counting) -> None:
    source = counting([100, 100])
    dataset = gpt_dataset(source, (0, 2), GPTOptions(seq=64), num_samples=None)
    dataset.rows(np.arange(2), np.arange(16, 32))
    assert source.read == 2 * 17


@hypothesis.settings(max_examples=30)
@hypothesis.given(lengths=LENGTHS)
def test_document_segments_are_the_stored_sequences(counting, lengths) -> None:
    source = counting(lengths)
    options = GPTOptions(seq=5, positions="document", segments="document")
    dataset = gpt_dataset(source, (0, len(lengths)), options, num_samples=9)
    rows = dataset.rows(np.arange(len(dataset)))
    document = np.searchsorted(np.cumsum(lengths), rows["tokens"], side="right")
    for row in range(len(dataset)):
        new = np.flatnonzero(np.diff(rows["segments"][row])) + 1
        begins = np.flatnonzero(np.diff(document[row])) + 1
        # A document that follows itself in the next epoch begins anew, too.
        assert set(begins.tolist()) <= set(new.tolist())
        for start, stop in zip([0, *new], [*new, 5], strict=True):
            assert len(set(document[row, start:stop].tolist())) == 1
            np.testing.assert_array_equal(
                rows["positions"][row, start:stop], np.arange(stop - start)
            )


def test_a_partial_last_row_is_padded_without_loss(write_pair) -> None:
    source = write_pair([5, 6])
    options = GPTOptions(seq=4, segments="document", positions="document")
    dataset = gpt_dataset(source, (0, 2), options, num_samples=None, keep_partial=True)
    assert len(dataset) == 3
    rows = dataset.rows(np.argsort(dataset.index.shuffle))
    assert rows["weights"].tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert rows["labels"][2, 2:].tolist() == rows["tokens"][2, 3:].tolist() * 2 == [0, 0]
    assert rows["segments"][2, 3] > rows["segments"][2, 2]


def test_a_token_beyond_the_vocabulary_is_named_with_its_file_and_sequence(tmp_path) -> None:
    with IndexedWriter(tmp_path / "x", "int32") as writer:
        for token in (1, 2, 70000, 3):
            writer.add_document([[token] * 4])
    source = IndexedFile(tmp_path / "x")
    options = GPTOptions(seq=3, vocab_size=50257)
    dataset = gpt_dataset(source, (0, 4), options, num_samples=None)
    with pytest.raises(ValueError, match=r"/x: sequence 2 holds token 70000, .* has 50257"):
        dataset.rows(np.arange(len(dataset)))


def test_identity_changes_with_all_that_decides_the_samples(write_pair) -> None:
    source, other = write_pair([9, 9, 9]), write_pair([9, 9, 8])

    def identity(source=source, bounds=(0, 3), num_samples=9, seq=4, **options: Any) -> str:
        made = GPTOptions(seq=seq, eod=0, **options)
        return gpt_dataset(source, bounds, made, num_samples=num_samples).identity

    changed = [
        identity(source=other),
        identity(bounds=(0, 2)),
        identity(num_samples=30),
        identity(seq=5),
        identity(seed=2),
        identity(positions="eod"),
        identity(segments="document"),
        identity(eod_loss=False),
        identity(next_token="wrap"),
        identity(pad=7),
    ]
    assert len({identity(), *changed}) == 1 + len(changed)
    assert identity() == identity()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seq": 0}, "seq 0 predicts nothing"),
        ({"seed": 1 << 32}, r"seed 4294967296 is outside \[0, 2\*\*32\)"),
        ({"positions": "eod"}, "look for the eod, which is None"),
        ({"eod_loss": False}, "look for the eod, which is None"),
    ],
)
def test_options_that_cannot_be_are_refused(change: dict[str, Any], text: str) -> None:
    options: dict[str, Any] = {"seq": 4, **change}
    with pytest.raises(ValueError, match=text):
        GPTOptions(**options)


def test_samples_of_a_split_that_rounds_to_nothing_are_refused_by_file_and_split(
    write_pair,
) -> None:
    """Megatron loops for ever here; without samples wanted the split is empty."""
    source = write_pair([5] * 200)
    data = Corpus(prefix=source.prefix, split="949,50,1")
    *_, test = gpt_datasets(data, GPTOptions(seq=4), num_samples=(8, 8, 0))
    assert test is not None
    assert len(test) == 0
    text = r"/pair: split '949,50,1' of 200 sequences leaves none for test, and 3 samples"
    with pytest.raises(ValueError, match=text):
        gpt_datasets(data, GPTOptions(seq=4), num_samples=(8, 8, 3))
    with pytest.raises(ValueError, match=r"leaves none for valid"):
        gpt_datasets(
            Corpus(prefix=source.prefix, split="1"), GPTOptions(seq=4), num_samples=(8, 8, 0)
        )


def test_sequences_of_floats_are_no_tokens(tmp_path) -> None:
    with IndexedWriter(tmp_path / "x", "float32") as writer:
        writer.add_document([np.ones(9)])
    with pytest.raises(ValueError, match="holds float32, and token ids are integers"):
        gpt_dataset(IndexedFile(tmp_path / "x"), (0, 1), GPTOptions(seq=4), num_samples=None)


def test_a_sample_past_the_end_is_refused(write_pair) -> None:
    dataset = gpt_dataset(write_pair([9]), (0, 1), GPTOptions(seq=4), num_samples=None)
    for bad in (2, -1):
        with pytest.raises(IndexError, match=f"sample {bad} is not one of 2"):
            dataset.rows(np.array([bad]))


def test_mock_data_counts_up_and_ends_with_eod() -> None:
    source = MockSequences(vocab_size=100, eod=99, count=50, longest=300)
    lengths = np.random.default_rng(0).integers(1, 300, 50)
    np.testing.assert_array_equal(source.lengths, lengths)
    for sequence in range(50):
        (start,) = source.starts(np.array([sequence]))
        expected = [*((np.arange(lengths[sequence] - 1) + 1) % 100).tolist(), 99]
        assert source.take(start + np.arange(lengths[sequence])).tolist() == expected
    dataset = gpt_dataset(source, (0, 50), GPTOptions(seq=16, vocab_size=100), num_samples=9)
    rows = dataset.rows(np.arange(9))
    ordinary = (rows["tokens"] != 99) & (rows["labels"] != 99)
    np.testing.assert_array_equal(rows["labels"][ordinary], ((rows["tokens"] + 1) % 100)[ordinary])
