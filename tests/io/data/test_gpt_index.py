"""The GPT indices: equal to Megatron's arrays, and to a walk over tokens one by one."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import IndexedFile, build_gpt_index, split_bounds
from megatree.io.data import gpt_index as module
from megatree.io.data.gpt_index import count_epochs
from megatree.io.data.splits import SPLITS

CASES = [f"g{number:02d}" for number in range(1, 14)]


@pytest.mark.parametrize("case", CASES)
def test_indices_equal_those_of_megatron(goldens, case: str) -> None:
    told, arrays = goldens.parameters["gpt"][case], goldens.arrays(f"gpt/{case}")
    source = IndexedFile(goldens.pair(told["corpus"]))
    compared = 0
    for split, bounds, num_samples in zip(
        SPLITS, split_bounds(told["split"], len(source)), told["num_samples"], strict=True
    ):
        assert (bounds is None) == (told["result"][split] is None)
        if bounds is None:
            continue
        if bounds[0] < bounds[1]:
            assert arrays[f"{split}.indexed_indices"].tolist() == [bounds[0], bounds[1] - 1]
        index = build_gpt_index(
            source.lengths,
            bounds,
            seq=told["seq_length"],
            num_samples=num_samples,
            seed=told["seed"],
            extra=int(told.get("add_extra_token_to_sequence", True)),
            keep_partial=split == "valid"
            and not told.get("drop_last_partial_validation_sequence", True),
        )
        for name, array in [
            ("document_index", index.documents),
            ("sample_index", index.samples),
            ("shuffle_index", index.shuffle),
        ]:
            expected = arrays[f"{split}.{name}"]
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected, err_msg=f"{split}.{name}")
            compared += 1
    assert compared == (3 if case == "g09" else 9)


def walk(lengths, documents, num_samples: int, seq: int, extra: int) -> list[list[int]]:
    """Return where samples start, by walking over the documents one by one."""
    rows, place, offset = [[0, 0]], 0, 0
    for _ in range(num_samples):
        remaining = seq + extra
        while remaining > 0:
            left = lengths[documents[place]] - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - extra
            elif place == len(documents) - 1:
                offset = lengths[documents[place]] - extra
                break
            else:
                place, offset = place + 1, 0
        rows.append([place, offset])
    return rows


@hypothesis.given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda x: sum(x) > 1),
    seq=st.integers(1, 12),
    num_samples=st.integers(0, 40),
    extra=st.integers(0, 1),
    keep_partial=st.booleans(),
    at_once=st.integers(1, 5),
)
def test_the_sample_index_is_that_of_a_walk(
    lengths, seq, num_samples, extra, keep_partial, at_once
) -> None:
    """Empty documents, samples that end with a document, and any piece size of the search."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(module, "_DOCUMENTS_AT_ONCE", at_once)
        index = build_gpt_index(
            np.array(lengths),
            (0, len(lengths)),
            seq=seq,
            num_samples=num_samples,
            seed=3,
            extra=extra,
            keep_partial=keep_partial,
        )
    epochs = len(index.documents) // len(lengths)
    available = epochs * sum(lengths) - extra
    count = -(-available // seq) if keep_partial else available // seq
    assert len(index.samples) == count + 1
    assert index.samples.tolist() == walk(lengths, index.documents, count, seq, extra)
    assert count >= num_samples
    assert sorted(index.shuffle.tolist()) == list(range(count))


@hypothesis.given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda x: sum(x) > 1),
    seq=st.integers(1, 12),
    num_samples=st.integers(1, 60),
)
def test_every_epoch_passes_every_document_once_and_no_epoch_is_spare(
    lengths, seq, num_samples
) -> None:
    total = sum(lengths)
    epochs = count_epochs(total, seq=seq, extra=1, num_samples=num_samples)
    assert (epochs.count - 1) * total < num_samples * seq + 1 <= epochs.count * total
    index = build_gpt_index(
        np.array(lengths), (0, len(lengths)), seq=seq, num_samples=num_samples, seed=1
    )
    counts = np.bincount(index.documents, minlength=len(lengths))
    assert counts.tolist() == [epochs.count] * len(lengths)
    if epochs.num_before_last is not None:
        last = index.documents[-len(lengths) :]
        assert sorted(last.tolist()) == list(range(len(lengths)))
        before = index.shuffle[: epochs.num_before_last]
        assert sorted(before.tolist()) == list(range(epochs.num_before_last))


@pytest.mark.parametrize("num_samples", [None, 0])
def test_a_split_of_no_sequence_gives_no_sample_at_once(num_samples) -> None:
    """200 documents, split 949,50,1: Megatron adds epochs of 0 tokens for ever."""
    bounds = split_bounds("949,50,1", 200)[2]
    assert bounds is not None
    assert bounds == (200, 200)
    index = build_gpt_index(
        np.full(200, 5, np.int32), bounds, seq=4, num_samples=num_samples, seed=1
    )
    assert len(index.documents) == len(index.shuffle) == 0
    assert index.samples.tolist() == [[0, 0]]


@pytest.mark.parametrize("lengths", [[], [0, 0, 0]])
def test_samples_of_no_token_are_refused_at_once(lengths) -> None:
    with pytest.raises(ValueError, match="0 tokens never make 7 samples"):
        build_gpt_index(
            np.array(lengths, np.int32), (0, len(lengths)), seq=4, num_samples=7, seed=1
        )


def test_long_streams_get_wide_numbers() -> None:
    """Megatron's dtypes: int32 places unless one passes int32, counted before any allocation."""
    longest = np.iinfo(np.int32).max
    index = build_gpt_index(np.array([longest]), (0, 1), seq=1 << 30, num_samples=None, seed=1)
    assert index.samples.dtype == np.int32
    assert index.samples.tolist() == [[0, 0], [0, 1 << 30]]
