"""The loader: an order of samples that no layout shows in, exactly once, in bounded memory."""

import collections
import gc
import itertools
import os
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from megatree.io.data import (
    GPTOptions,
    Loader,
    Share,
    Stream,
    blend_by_weights,
    gpt_dataset,
)

SEQ = 6


class Numbered:
    """Sample i is (i, 0), (i, 1), ... as numbers i * 100 + column."""

    identity = "numbered"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def rows(self, ids, columns=None):
        columns = np.arange(SEQ) if columns is None else columns
        return {"tokens": ids[:, None] * 100 + columns}

    def verify(self) -> None:
        pass


def stream(size: int = 1000, seed: int | None = None) -> Stream:
    return Stream(dataset=Numbered(size), seed=seed)


def samples(steps) -> list[int]:
    parts = [m["tokens"][:, 0] // 100 for step in steps for m in step.microbatches]
    return np.concatenate([np.zeros(0, np.int64), *parts]).tolist()


@st.composite
def runs(draw) -> list[tuple[int, int, int, list[int], int]]:
    """Parts of a run: (steps, batch size, microbatch, row cuts, column cuts) of each."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        micro = draw(st.integers(1, 6))
        cuts = sorted(draw(st.lists(st.integers(0, micro), max_size=3)))
        size = micro * draw(st.integers(1, 3))
        parts.append((draw(st.integers(0, 3)), size, micro, cuts, draw(st.sampled_from([1, 2, 3]))))
    return parts


@hypothesis.settings(max_examples=40)
@hypothesis.given(run=runs(), seed=st.sampled_from([None, 7]), prefetch=st.integers(0, 2))
def test_the_order_shows_neither_layout_nor_batch_size_nor_resumes(run, seed, prefetch) -> None:
    """Ranks, microbatches and batch sizes change at each resume; samples come once, in order."""
    source, consumed, dealt = stream(seed=seed), 0, []
    for steps, size, micro, cuts, num_columns in run:
        edges = [0, *cuts, micro]
        grid = np.arange(SEQ).reshape(num_columns, -1)
        whole = np.zeros((steps, size, SEQ), np.int64)
        for (lo, hi), columns in itertools.product(itertools.pairwise(edges), grid):
            share = Share(microbatch_size=micro, rows=(lo, hi), columns=columns)
            with Loader(
                source, batch_size=size, share=share, consumed=consumed, prefetch=prefetch
            ) as loader:
                for step, batch in enumerate(itertools.islice(loader, steps)):
                    assert batch.consumed == consumed + step * size
                    for number, part in enumerate(batch.microbatches):
                        rows = slice(number * micro + lo, number * micro + hi)
                        whole[step, rows, columns[0] : columns[-1] + 1] = part["tokens"]
                assert loader.consumed == consumed + steps * size
        assert (whole % 100 == np.arange(SEQ)).all()
        dealt += (whole[..., 0] // 100).ravel().tolist()
        consumed += steps * size
    expected = source.batch(0, consumed)["tokens"][:, 0] // 100
    assert dealt == expected.tolist()
    assert len(set(dealt)) == len(dealt)


def test_the_rows_of_a_rank_are_those_of_the_sampler_of_megatron() -> None:
    """There rank r of D takes [r * mbs, (r + 1) * mbs) of each block of mbs * D, from consumed."""
    mbs, ranks, consumed = 3, 4, 24
    for rank in range(ranks):
        share = Share(microbatch_size=mbs * ranks, rows=(rank * mbs, (rank + 1) * mbs))
        with Loader(stream(), batch_size=24, share=share, consumed=consumed) as loader:
            got = samples(itertools.islice(loader, 2))
        blocks = range(consumed, consumed + 48, mbs * ranks)
        assert got == [b + rank * mbs + i for b in blocks for i in range(mbs)]


@pytest.mark.parametrize("stopped_after", range(6))
def test_a_ramp_of_batch_sizes_resumes_anywhere(stopped_after: int) -> None:
    def ramp(consumed: int) -> int:
        return min(4 + 4 * (consumed // 10), 16)

    with Loader(stream(), batch_size=ramp) as loader:
        whole = list(itertools.islice(loader, 8))
    assert [s.num_samples for s in whole] == [4, 4, 4, 8, 12, 16, 16, 16]
    with Loader(stream(), batch_size=ramp) as loader:
        before = list(itertools.islice(loader, stopped_after))
        consumed = loader.consumed
    with Loader(stream(), batch_size=ramp, consumed=consumed) as loader:
        after = list(itertools.islice(loader, 8 - stopped_after))
    assert samples(before + after) == samples(whole) == list(range(80))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_run_ends_before_a_step_that_would_pass_its_end(prefetch: int) -> None:
    with Loader(stream(), batch_size=8, stop=30, prefetch=prefetch) as loader:
        assert samples(loader) == list(range(24))
        with pytest.raises(StopIteration):
            next(loader)


def test_epochs_go_on_with_a_seed_and_end_without() -> None:
    endless = stream(5, seed=3)
    got = (endless.batch(0, 15)["tokens"][:, 0] // 100).reshape(3, 5)
    np.testing.assert_array_equal(np.sort(got, axis=1), np.tile(np.arange(5), (3, 1)))
    with Loader(stream(5), batch_size=2) as loader:
        assert samples(itertools.islice(loader, 2)) == [0, 1, 2, 3]
        for _ in range(2):
            with pytest.raises(
                ValueError, match="2 samples after 4 pass the end of a dataset of 5"
            ):
                next(loader)


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_steps_are_read_ahead_than_asked_for(depth: int) -> None:
    read = threading.Semaphore(0)

    class Counting(Numbered):
        def rows(self, ids, columns=None):
            read.release()
            return super().rows(ids, columns)

    with Loader(Stream(dataset=Counting(1000)), batch_size=4, prefetch=depth) as loader:
        for _ in range(depth):
            assert read.acquire(timeout=30)
        assert not read.acquire(timeout=0.05)
        next(loader)
        assert read.acquire(timeout=30)
        assert not read.acquire(timeout=0.05)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_the_thread_ends_with_the_loader(how: str) -> None:
    before = set(threading.enumerate())
    loader = Loader(stream(), batch_size=4)
    (thread,) = set(threading.enumerate()) - before
    next(loader)
    if how == "close":
        loader.close()
        loader.close()
        with pytest.raises(ValueError, match="is closed"):
            next(loader)
    del loader
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_file_that_changes_under_a_running_job_stops_it(write_pair, prefetch: int) -> None:
    source = write_pair([400])
    dataset = gpt_dataset(source, (0, 1), GPTOptions(seq=4), num_samples=None)
    with Loader(Stream(dataset=dataset, seed=1), batch_size=2, prefetch=prefetch) as loader:
        next(loader)
        os.utime(f"{source.prefix}.bin", ns=(1, 1))
        with pytest.raises(ValueError, match=r"pair\.bin: changed while it was in use"):
            collections.deque(itertools.islice(loader, prefetch + 2))


def test_a_blend_notices_a_change_of_any_of_its_files(write_pair) -> None:
    sources = [write_pair([400]), write_pair([400])]
    parts = [gpt_dataset(s, (0, 1), GPTOptions(seq=4), num_samples=None) for s in sources]
    blend = Stream(dataset=blend_by_weights(parts, [1, 1], 20))
    blend.verify()
    os.utime(f"{sources[1].prefix}.idx", ns=(1, 1))
    with pytest.raises(ValueError, match=r"pair\.idx: changed"):
        blend.verify()


def test_identity_changes_with_dataset_and_seed() -> None:
    class Other(Numbered):
        identity = "other"

    changed = [stream(seed=1), stream(seed=2), Stream(dataset=Other(1000))]
    assert len({s.identity for s in [stream(), *changed]}) == 4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: next(Loader(stream(), batch_size=0)), "0 samples of the step after 0"),
        (
            lambda: next(Loader(stream(), batch_size=6, share=Share(microbatch_size=4))),
            "6 samples of the step after 0 are no whole number of microbatches of 4",
        ),
        (lambda: Loader(stream(), batch_size=1, prefetch=-1), "prefetch -1"),
        (lambda: Loader(stream(), batch_size=1, consumed=-1), "consumed -1"),
        (lambda: stream().batch(-1, 2), "after -1 do not exist"),
        (lambda: stream().batch(0, 8, rows=(3, 9)), r"rows \(3, 9\) of 8 samples"),
        (lambda: stream(0, seed=1), "0 samples never ends an epoch"),
    ],
)
def test_what_cannot_be_is_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_pinning_without_a_device_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="pin needs CUDA"):
        Loader(stream(), batch_size=1, pin=True)


@pytest.mark.gpu
def test_pinned_batches_copy_to_the_device_as_they_are() -> None:
    with Loader(stream(), batch_size=4, pin=True) as loader:
        steps = list(itertools.islice(loader, 8))
    moved = [m["tokens"].to("cuda", non_blocking=True) for s in steps for m in s.microbatches]
    torch.cuda.synchronize()
    assert all(m["tokens"].is_pinned() for s in steps for m in s.microbatches)
    assert (torch.cat(moved)[:, 0] // 100).tolist() == list(range(32))
