"""Index building for a large corpus against plain numpy, and what the loader deals per second.

    python -m benchmarks.data_index            # 10^9 tokens in 10^7 documents; a 2 GB sparse file
    python -m benchmarks.data_index --documents 100000 --tokens 10000000
    python -m benchmarks.data_index --helpers FILE   # helpers_cpp*.so of a megatron-core wheel

Every part runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairs import interleave, report, spread
from megatree.io.data import (
    GPTOptions,
    IndexCache,
    IndexedFile,
    Loader,
    Stream,
    blend_order,
    build_gpt_index,
    build_masked_index,
    exhaustive_order,
    gpt_dataset,
)
from megatree.io.data.blend_order import Rule
from megatree.io.data.gpt_index import count_epochs, sample_index
from megatree.io.data.index_format import write_index
from megatree.io.data.packing import pack

SEQ = 2048


def made_lengths(documents: int, tokens: int) -> np.ndarray:
    """Return lengths of documents, log-normal like those of a web corpus, of `tokens` in all."""
    drawn = np.random.default_rng(1).lognormal(0.0, 1.0, documents)
    return np.maximum(drawn * (tokens / drawn.sum()), 1).astype(np.int32)


def plain_index(lengths: np.ndarray, seq: int, seed: int) -> np.ndarray:
    """Return the sample index as a loop over documents makes it."""
    random = np.random.RandomState(seed)
    documents = np.arange(len(lengths), dtype=np.int32)
    random.shuffle(documents)
    num_samples = (int(lengths.sum(dtype=np.int64)) - 1) // seq
    out = np.zeros((num_samples + 1, 2), np.int32)
    place, offset = 0, 0
    for row in range(1, num_samples + 1):
        remaining = seq + 1
        while remaining > 0:
            left = int(lengths[documents[place]]) - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - 1
            else:
                place, offset = place + 1, 0
        out[row] = place, offset
    random.shuffle(np.arange(num_samples, dtype=np.uint32))
    return out


def plain_rows(source: IndexedFile, index: Any, ids: np.ndarray) -> np.ndarray:
    """Return samples as a loop over their documents reads them."""
    out = []
    for sample in index.shuffle[ids].tolist():
        (first, start), (last, stop) = index.samples[sample].tolist(), index.samples[sample + 1]
        parts = []
        for place in range(first, int(last) + 1):
            text = source[int(index.documents[place])]
            lo = start if place == first else 0
            hi = int(stop) + 1 if place == last else len(text)
            parts.append(text[lo:hi])
        out.append(np.concatenate(parts).astype(np.int64))
    return np.stack(out)


def timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call and its seconds."""
    start = time.perf_counter()
    value = fn()
    return value, time.perf_counter() - start


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: has no RssAnon. Use Linux 4.5 or later.")


def most_bytes(fn: Callable[[], Any]) -> int:
    """Return the most memory that a call allocates, its result included."""
    tracemalloc.start()
    fn()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def bench_index(folder: str, documents: int, tokens: int) -> None:
    """Time one epoch of GPT indices."""
    lengths = made_lengths(documents, tokens)
    build = partial(build_gpt_index, lengths, (0, documents), seq=SEQ, num_samples=None, seed=1)
    index, seconds = timed(build)
    report(
        "gpt_index",
        tokens=int(lengths.sum(dtype=np.int64)),
        documents=documents,
        samples=len(index.shuffle),
        seconds=seconds,
        peak_bytes=most_bytes(build),
    )
    np.save(f"{folder}/ours.npy", index.samples)


def bench_plain(folder: str, documents: int, tokens: int) -> None:
    """Time the same with a loop, and compare the arrays."""
    lengths = made_lengths(documents, tokens)
    samples, seconds = timed(lambda: plain_index(lengths, SEQ, 1))
    equal = bool(np.array_equal(samples, np.load(f"{folder}/ours.npy")))
    report("gpt_index_plain", seconds=seconds, equal_to_ours=equal)


def load_helpers(path: str) -> Any:
    """Return Megatron's compiled index functions, without importing Megatron."""
    spec = importlib.util.spec_from_file_location("helpers_cpp", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench_megatron(path: str, folder: str, documents: int, tokens: int) -> None:
    """Time our index functions and Megatron's in turns, on one core; the arrays must be equal.

    For GPT that is all of an epoch's index (on their side numpy shuffles, as in Megatron) and the
    sample index alone, for BERT the mapping of a tenth of the corpus, for blends the order of a
    million samples.
    """
    helpers = load_helpers(path)
    lengths = made_lengths(documents, tokens)
    few = lengths[: documents // 10]
    bounds = np.arange(0, len(few) + 1, 10)
    weights = np.random.default_rng(1).dirichlet(np.ones(20))
    size = 1_000_000

    def their_gpt() -> np.ndarray:
        random = np.random.RandomState(1)
        order = np.arange(documents, dtype=np.int32)
        random.shuffle(order)
        total = int(lengths.sum(dtype=np.int64))
        samples = helpers.build_sample_idx_int32(lengths, order, SEQ, 1, total, True, 1)
        random.shuffle(np.arange(len(samples) - 1, dtype=np.uint32))
        return samples

    def our_gpt() -> np.ndarray:
        index = build_gpt_index(lengths, (0, documents), seq=SEQ, num_samples=None, seed=1)
        return index.samples

    order = np.random.default_rng(1).permutation(documents).astype(np.int32)
    total = int(lengths.sum(dtype=np.int64))

    def their_samples() -> np.ndarray:
        return helpers.build_sample_idx_int32(lengths, order, SEQ, 1, total, True, 1)

    def our_samples() -> np.ndarray:
        epochs = count_epochs(total, seq=SEQ, extra=1, num_samples=None)
        return sample_index(lengths, order, 0, epochs, keep_partial=False)

    def their_bert() -> np.ndarray:
        return helpers.build_mapping(bounds, few, 1, 2**31 - 2, 509, 0.1, 1, False, 2)

    def our_bert() -> np.ndarray:
        return build_masked_index(
            few,
            bounds,
            longest=509,
            min_sentences=2,
            short_probability=0.1,
            num_samples=None,
            seed=1,
        )

    def their_blend() -> np.ndarray:
        which, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(which, sample, weights, len(weights), size, False)
        return which

    def our_blend() -> np.ndarray:
        return blend_order(weights.tolist(), size)[0]

    sides = {
        "gpt_index": (our_gpt, their_gpt),
        "gpt_sample_index": (our_samples, their_samples),
        "masked_index": (our_bert, their_bert),
        "blend_order": (our_blend, their_blend),
    }
    for name, (ours, theirs) in sides.items():
        equal = bool(np.array_equal(ours(), theirs()))
        times = interleave(ours, theirs, pairs=5, warmup=0)
        report(
            f"{name}_against_megatron",
            equal=equal,
            ours_s=statistics.median(times.ours),
            theirs_s=statistics.median(times.theirs),
            time_over_theirs=spread(times.ratios),
            cpu_over_theirs=statistics.median(times.cpu_ratios),
        )


def bench_file(folder: str, documents: int, tokens: int) -> None:
    """Time opening a pair, the cache, and batches."""
    lengths = made_lengths(documents, tokens)
    prefix = f"{folder}/pair"
    with open(f"{prefix}.idx", "wb") as file:
        ends = np.arange(documents + 1, dtype=np.int64)
        file.writelines(write_index(np.dtype("<u2"), lengths, ends, None))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))  # zeros that take no disk
    source, opened = timed(lambda: IndexedFile(prefix))
    report(
        "open_and_check_pair", seconds=opened, peak_bytes=most_bytes(lambda: IndexedFile(prefix))
    )
    cache = IndexCache(folder=Path(folder) / "cache")
    options = GPTOptions(seq=SEQ, eod=1, positions="eod", segments="eod", vocab_size=50257)

    def open_dataset() -> Any:
        return gpt_dataset(source, (0, documents), options, num_samples=None, cache=cache)

    _, first = timed(open_dataset)
    dataset, again = timed(open_dataset)
    report("dataset_from_cache", first_seconds=first, again_seconds=again)
    steps, size = 60, 16
    ids = np.random.default_rng(2).integers(0, len(dataset), (steps, size))
    bare = replace(dataset, options=GPTOptions(seq=SEQ))
    sides: dict[str, Callable[[np.ndarray], Any]] = {
        "rows": bare.rows,
        "rows_plain_tokens_only": partial(plain_rows, source, dataset.index),
        "rows_with_positions_segments_and_checks": dataset.rows,
    }
    for name, read in sides.items():
        for part in ids:  # pages in
            read(part)
        _, seconds = timed(lambda read=read: [read(part) for part in ids])
        report(name, samples_per_s=ids.size / seconds, tokens_per_s=ids.size * SEQ / seconds)
    bench_loader(dataset, steps)


def bench_loader(dataset: Any, steps: int) -> None:
    """Time the loader, and see that its memory stays where it is."""
    with Loader(Stream(dataset=dataset, seed=1), batch_size=64, prefetch=4) as loader:
        next(loader)
        before = anonymous_bytes()
        most = 0

        def walk() -> int:
            nonlocal most
            total = 0
            for step in itertools.islice(loader, steps):
                total += step.num_samples
                most = max(most, anonymous_bytes() - before)
            return total

        total, seconds = timed(walk)
    report("loader", samples_per_s=total / seconds, extra_bytes=most, step_bytes=64 * SEQ * 36)


def bench_others(folder: str, documents: int, tokens: int) -> None:
    """Time the other indices, each on a tenth of the corpus or on a million samples."""
    lengths = made_lengths(documents, tokens)
    few = lengths[: documents // 10]
    bounds = np.arange(0, len(few) + 1, 10)
    index, seconds = timed(
        lambda: build_masked_index(
            few,
            bounds,
            longest=509,
            min_sentences=2,
            short_probability=0.1,
            num_samples=None,
            seed=1,
        )
    )
    report("masked_index", sentences=len(few), samples=len(index), seconds=seconds)
    (_, bounds), seconds = timed(lambda: pack(np.minimum(few, SEQ), SEQ))
    report("pack", items=len(few), rows=len(bounds) - 1, seconds=seconds)
    size = 1_000_000
    for count in (3, 100):
        weights = np.random.default_rng(1).dirichlet(np.ones(count)).tolist()
        rules: tuple[Rule, ...] = ("megatron", "quota")
        for rule in rules:
            _, seconds = timed(partial(blend_order, weights, size, rule=rule))
            report("blend_order", datasets=count, rule=rule, samples=size, seconds=seconds)
    _, seconds = timed(lambda: exhaustive_order([size // 2, size // 3, size // 6]))
    report("exhaustive_order", samples=size, seconds=seconds)


def main() -> None:
    """Run all parts, one process each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--helpers", help="compare with Megatron's compiled functions in this file")
    told = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        parts: list[Callable[..., None]] = [bench_index, bench_plain, bench_file, bench_others]
        if told.helpers:
            parts = [partial(bench_megatron, told.helpers)]
        for part in parts:
            process = spawn.Process(target=part, args=(folder, told.documents, told.tokens))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
