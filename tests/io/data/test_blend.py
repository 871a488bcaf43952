"""Blends: Megatron's order, and shares that hold at every prefix."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from megatree.io.data import (
    Blend,
    BlendedDataset,
    Corpus,
    GPTOptions,
    blend_by_epochs,
    blend_by_weights,
    blend_order,
    exhaustive_order,
    gpt_dataset,
    gpt_datasets,
    parse_blend,
)
from megatree.io.data.blend_order import normalised
from megatree.io.data.splits import SPLITS

WEIGHTS = st.lists(st.floats(0.001, 1), min_size=1, max_size=8)


@pytest.mark.parametrize("number", range(6))
def test_the_order_by_weights_is_that_of_megatron(goldens, number: int) -> None:
    arrays = goldens.arrays("blend/index_functions")
    expected = arrays[f"greedy{number}.dataset_index"]
    dataset, sample = blend_order(arrays[f"greedy{number}.weights"].tolist(), len(expected))
    assert dataset.dtype == expected.dtype
    np.testing.assert_array_equal(dataset, expected)
    np.testing.assert_array_equal(sample, arrays[f"greedy{number}.dataset_sample_index"])


@pytest.mark.parametrize("number", range(4))
def test_the_exhaustive_order_is_that_of_megatron(goldens, number: int) -> None:
    arrays = goldens.arrays("blend/index_functions")
    dataset, sample = exhaustive_order(arrays[f"exhaustive{number}.sizes"].tolist())
    np.testing.assert_array_equal(dataset, arrays[f"exhaustive{number}.dataset_index"])
    np.testing.assert_array_equal(sample, arrays[f"exhaustive{number}.dataset_sample_index"])


@pytest.mark.parametrize("case", ["b1", "b2", "b3", "b4", "b5", "b6"])
def test_blended_samples_equal_those_of_megatron(goldens, case: str) -> None:
    told, arrays = goldens.parameters["blend"][case], goldens.arrays(f"blend/{case}")
    prefixes = [str(goldens.pair(name)) for name in told["corpora"]]
    words = prefixes
    if told["weights"]:
        words = [w for pair in zip(map(str, told["weights"]), prefixes, strict=True) for w in pair]
    datasets = gpt_datasets(
        parse_blend(words, split=told["split"]),
        GPTOptions(seq=told["seq_length"], seed=told["seed"]),
        num_samples=tuple(told["num_samples"]),
    )
    for split, dataset in zip(SPLITS, datasets, strict=True):
        assert (dataset is not None) == (split in told["result"])
        if dataset is None:
            continue
        assert isinstance(dataset, BlendedDataset)
        assert len(dataset) == told["result"][split]["len"]
        assert [len(part) for part in dataset.datasets] == arrays[f"{split}.mid_len"].tolist()
        np.testing.assert_array_equal(dataset.dataset_index, arrays[f"{split}.dataset_index"])
        np.testing.assert_array_equal(dataset.sample_index, arrays[f"{split}.dataset_sample_index"])
        first = arrays[f"{split}.first_tokens"]
        np.testing.assert_array_equal(dataset.rows(np.arange(len(first)))["tokens"], first)


def deviations(chosen: np.ndarray, weights: list[float]) -> np.ndarray:
    """Return per step and dataset the samples dealt less its share of the prefix."""
    dealt = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    return dealt - np.arange(1, len(chosen) + 1)[:, None] * np.array(weights)


@hypothesis.settings(max_examples=60)
@hypothesis.given(weights=WEIGHTS, size=st.integers(1, 300))
def test_the_quota_rule_is_within_one_sample_at_any_prefix(weights, size: int) -> None:
    shares = normalised(weights)
    chosen, _ = blend_order(shares, size, rule="quota")
    assert np.abs(deviations(chosen, shares)).max() < 1 + 1e-9


@hypothesis.settings(max_examples=60)
@hypothesis.given(weights=WEIGHTS, size=st.integers(1, 300))
def test_the_rule_of_megatron_never_runs_a_sample_ahead(weights, size: int) -> None:
    """It may lag by more than one with three datasets or more; with two it may not."""
    shares = normalised(weights)
    deviation = deviations(blend_order(shares, size)[0], shares)
    assert deviation.max() < 1 + 1e-9
    assert deviation.min() > (-1 if len(weights) <= 2 else -2) - 1e-9


@hypothesis.settings(max_examples=60)
@hypothesis.given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_the_exhaustive_order_deals_every_sample_once(sizes: list[int]) -> None:
    dataset, sample = exhaustive_order(sizes)
    pairs = sorted(zip(dataset.tolist(), sample.tolist(), strict=True))
    assert pairs == [(k, i) for k, size in enumerate(sizes) for i in range(size)]


@pytest.mark.parametrize("rule", ["megatron", "quota"])
@pytest.mark.parametrize("weights", [[0.0, 1.0], [1.0, 0.0], [0.0, 0.5, 0.5]])
def test_a_weight_of_zero_deals_nothing(rule, weights) -> None:
    """The bare rule deals the first dataset as soon as no other lags."""
    dataset, _ = blend_order(weights, 50, rule=rule)
    assert {weights[k] for k in dataset.tolist()} == {max(weights)}


@pytest.fixture
def datasets(write_pair):
    return [
        gpt_dataset(write_pair([n]), (0, 1), GPTOptions(seq=4), num_samples=None) for n in (41, 21)
    ]


def test_blending_by_epochs_deals_each_dataset_that_often(datasets) -> None:
    blend = blend_by_epochs(datasets, [1.5, 2])
    assert len(blend) == 15 + 10
    rows = blend.rows(np.arange(25))["tokens"][:, 0]
    counts = {k: np.bincount(rows[blend.dataset_index == k] // 4) for k in (0, 1)}
    assert counts[1].tolist() == [2] * 5
    assert sorted(counts[0].tolist()) == [1] * 5 + [2] * 5


def test_blends_nest(datasets) -> None:
    inner = blend_by_weights(datasets, [1, 1], 8)
    outer = blend_by_weights([inner, datasets[1]], [1, 1], 4)
    rows = outer.rows(np.arange(4))
    expected = [inner, datasets[1], inner, datasets[1]]
    for row, (dataset, sample) in enumerate(zip(expected, [0, 0, 1, 1], strict=True)):
        one = dataset.rows(np.array([sample]))
        for name, array in rows.items():
            np.testing.assert_array_equal(array[row], one[name][0])
    assert outer.identity != blend_by_weights([inner, datasets[1]], [2, 1], 4).identity


def test_a_tree_of_corpora_is_built_with_the_samples_that_it_needs(write_pair) -> None:
    a, b, c = (Corpus(prefix=write_pair([50] * 20).prefix) for _ in range(3))
    data = Blend(parts=(a, Blend(parts=(b, c), weights=(1, 3))), weights=(1, 1))
    train, valid, test = gpt_datasets(data, GPTOptions(seq=8), num_samples=(400, 0, 0))
    assert valid is test is None
    assert isinstance(train, BlendedDataset)
    assert len(train) == 400
    inner = train.datasets[1]
    assert isinstance(inner, BlendedDataset)
    first = np.bincount(inner.dataset_index[train.sample_index[train.dataset_index == 1]])
    assert first.tolist() == [50, 150]
    epochs = Blend(parts=(a, b), epochs=(2, 1))
    train, _, _ = gpt_datasets(epochs, GPTOptions(seq=8), num_samples=(None, 0, 0))
    assert isinstance(train, BlendedDataset)
    assert np.bincount(train.dataset_index).tolist() == [2 * 118, 118]


def test_a_list_for_each_split_uses_each_file_whole(write_pair) -> None:
    files = [write_pair([n]) for n in (41, 21)]
    data = [Corpus(prefix=files[0].prefix), Blend(parts=(Corpus(prefix=files[1].prefix),)), None]
    train, valid, test = gpt_datasets(data, GPTOptions(seq=4), num_samples=(None, None, None))
    assert [None if d is None else len(d) for d in (train, valid, test)] == [10, 5, None]


def test_taking_more_samples_than_a_dataset_has_is_refused(datasets) -> None:
    """Megatron raises an IndexError when the run comes to the missing sample."""
    with pytest.raises(ValueError, match="takes 6 samples of dataset 1, which has 5"):
        blend_by_weights(datasets, [1, 1], 12)


def test_rows_of_different_kinds_are_not_blended(datasets, write_pair) -> None:
    other = gpt_dataset(write_pair([41]), (0, 1), GPTOptions(seq=5), num_samples=None)
    with pytest.raises(ValueError, match="Build all with the same options"):
        blend_by_weights([datasets[0], other], [1, 1], 4).rows(np.arange(4))


@pytest.mark.parametrize(
    ("words", "parts", "weights"),
    [
        (["a"], None, None),
        (["a", "b"], ["a", "b"], None),
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["0.3", "a", "7", "b"], ["a", "b"], (0.3, 7.0)),
        (["1", "a"], ["a"], (1.0,)),
    ],
)
def test_data_paths_are_read_like_those_of_megatron(words, parts, weights) -> None:
    data = parse_blend(words)
    if parts is None:
        assert data == Corpus(prefix="a")
    else:
        assert data == Blend(parts=tuple(Corpus(prefix=p) for p in parts), weights=weights)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda d: parse_blend([]), "is not one prefix"),
        (lambda d: parse_blend(["0.3", "a", "b", "c"]), "weights and prefixes in turn"),
        (lambda d: blend_by_weights(d, [1], 4), "1 weights for 2 datasets"),
        (lambda d: blend_by_weights(d, [0, 0], 4), r"weights \[0, 0\] are not shares"),
        (lambda d: blend_by_weights(d, [-1, 2], 4), r"weights \[-1, 2\] are not shares"),
        (lambda d: blend_by_weights(d, [float("nan"), 2], 4), "are not shares"),
        (lambda d: blend_by_epochs(d, [-1, 1]), r"epochs \[-1, 1\] are not counts"),
        (lambda d: blend_order([2**-16] * 2**16, 1), "65536 datasets are more than the 32767"),
        (lambda d: Blend(parts=(Corpus(prefix="a"),), weights=(1, 2)), "2 weights for 1 parts"),
        (lambda d: Blend(parts=()), "0 parts"),
        (
            lambda d: gpt_datasets(
                Blend(parts=(Corpus(prefix="a"),), weights=(1,)),
                GPTOptions(seq=4),
                num_samples=(None, 1, 1),
            ),
            "weights do not say how many samples train has",
        ),
    ],
)
def test_what_cannot_be_is_refused(datasets, call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(datasets)
