"""What the index benchmark compares with gives the same numbers."""

import numpy as np

from benchmarks.data_index import made_lengths, plain_index, plain_rows
from megatree.io.data import GPTOptions, build_gpt_index, gpt_dataset


def test_the_plain_index_and_the_plain_rows_are_ours(write_pair) -> None:
    lengths = made_lengths(200, 6000)
    assert abs(lengths.sum() - 6000) < 200
    index = build_gpt_index(lengths, (0, 200), seq=64, num_samples=None, seed=5)
    np.testing.assert_array_equal(plain_index(lengths, 64, 5), index.samples)
    source = write_pair(lengths.tolist())
    dataset = gpt_dataset(source, (0, 200), GPTOptions(seq=64), num_samples=None)
    ids = np.arange(len(dataset))
    text = plain_rows(source, dataset.index, ids)
    np.testing.assert_array_equal(text[:, :-1], dataset.rows(ids)["tokens"])
