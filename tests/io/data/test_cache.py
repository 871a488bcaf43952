"""The index cache: built once, whole or absent, and nobody waits for ever or in the dark."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from megatree.io.data import GPTOptions, IndexCache, first_rank, gpt_dataset
from megatree.io.data import cache as module

KEY = {"kind": "test", "bounds": (0, 3)}


@pytest.fixture(autouse=True)
def _fast(monkeypatch) -> None:
    monkeypatch.setattr(first_rank, "_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(module, "_VISIBLE_S", 0.05)


def arrays() -> dict[str, np.ndarray]:
    return {"a": np.arange(5, dtype=np.int32), "none": np.zeros((0, 2), np.int64)}


def test_arrays_are_built_once_and_mapped_afterwards(tmp_path) -> None:
    built = []

    def build():
        built.append(1)
        return arrays()

    for _ in range(2):
        got = IndexCache(folder=tmp_path / "new").get("x", KEY, build)
        for name, array in arrays().items():
            np.testing.assert_array_equal(got[name], array)
            assert got[name].dtype == array.dtype
        assert not got["a"].flags.owndata
        assert not got["a"].flags.writeable
    assert len(built) == 1
    IndexCache(folder=tmp_path / "new").get("x", {**KEY, "seed": 2}, build)
    assert len(built) == 2


def test_one_rank_builds_for_all(tmp_path, run_ranks) -> None:
    built = []

    def job(world):
        def build():
            built.append(world.rank)
            return arrays()

        return IndexCache(folder=tmp_path, world=world).get("x", KEY, build)["a"].tolist()

    assert run_ranks(4, job) == [[0, 1, 2, 3, 4]] * 4
    assert built == [0]


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_a_failed_build_is_raised_on_all_ranks_and_leaves_nothing(
    tmp_path, run_ranks, kind
) -> None:
    def fail():
        raise kind("no room for 7 bytes")

    outcomes = run_ranks(
        3, lambda world: IndexCache(folder=tmp_path, world=world).get("x", KEY, fail)
    )
    assert [str(o) for o in outcomes] == [
        "no room for 7 bytes",
        *["rank 0: no room for 7 bytes"] * 2,
    ]
    assert all(isinstance(o, kind) for o in outcomes)
    assert os.listdir(tmp_path) == []


def test_waiting_ends_at_the_deadline_and_says_for_what(tmp_path, run_ranks) -> None:
    release = threading.Event()

    def slow():
        release.wait()
        return arrays()

    outcomes = run_ranks(
        3,
        lambda world: IndexCache(folder=tmp_path, world=world, deadline_s=0.05).get(
            "corpus[0:90]", KEY, slow
        ),
    )
    release.set()
    for outcome in outcomes:
        assert isinstance(outcome, TimeoutError)
        assert "corpus[0:90]: rank 0 has been building it for 0 seconds" in str(outcome)
        assert "megatree data index" in str(outcome)


def test_a_rank_that_does_not_see_the_folder_is_named(tmp_path, run_ranks) -> None:
    outcomes = run_ranks(
        2,
        lambda world: IndexCache(folder=tmp_path / str(world.rank), world=world).get(
            "x", KEY, arrays
        ),
    )
    for outcome in outcomes:
        assert isinstance(outcome, OSError)
        assert "rank 1 does not see what rank 0 wrote" in str(outcome)


def test_a_damaged_array_is_named_with_what_to_remove(tmp_path) -> None:
    cache = IndexCache(folder=tmp_path)
    cache.get("x", KEY, arrays)
    (path,) = tmp_path.glob("*.a.npy")
    (note,) = tmp_path.glob("*.json")
    for raw in (path.read_bytes()[:-1], b"", b"nonsense"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=rf"\.a\.npy: cannot be read .* Remove {note.name}"):
            cache.get("x", KEY, arrays)
    note.unlink()
    assert cache.get("x", KEY, arrays)["a"].tolist() == [0, 1, 2, 3, 4]


def test_a_build_that_dies_while_it_writes_leaves_no_entry(tmp_path, monkeypatch) -> None:
    real = os.replace

    def replace(source, target):
        if str(target).endswith(".json"):
            raise OSError("power cut")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="power cut"):
            IndexCache(folder=tmp_path).get("x", KEY, arrays)
    built = []
    IndexCache(folder=tmp_path).get("x", KEY, lambda: built.append(1) or arrays())
    assert built == [1]


def test_an_index_is_found_by_content_not_by_place(tmp_path: Path, write_pair, monkeypatch) -> None:
    """A copy of the data elsewhere uses the same entry; other parameters never do."""
    cache = IndexCache(folder=tmp_path)

    def dataset(lengths, seq: int = 4, **options):
        source = write_pair(lengths)
        return gpt_dataset(
            source, (0, len(lengths)), GPTOptions(seq=seq, **options), num_samples=9, cache=cache
        )

    first = dataset([9, 9, 9])
    files = len(os.listdir(tmp_path))
    again = dataset([9, 9, 9])
    assert len(os.listdir(tmp_path)) == files == 4
    assert first.identity == again.identity
    for name, array in first.rows(np.arange(9)).items():
        np.testing.assert_array_equal(array, again.rows(np.arange(9))[name])
    dataset([9, 9, 8])
    dataset([9, 9, 9], seq=5)
    dataset([9, 9, 9], seed=3)
    assert len(os.listdir(tmp_path)) == 4 * files
