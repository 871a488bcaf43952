"""Group the sentences of documents into samples for masked language models, as Megatron does.

A sample is a run of sentences of one document: first, end, and the number of tokens it may have.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import repeat

import numpy as np
from jaxtyping import Integer

from megatree.io.data import loops
from megatree.io.data.cache import IndexCache
from megatree.io.data.mersenne import shuffled
from megatree.io.data.sequences import Sequences

_LONG_SENTENCE = 512  # tokens; a document of several sentences with a longer one is left out
_DRAWN_AT_ONCE = 1 << 16


def masked_index(
    source: Sequences,
    bounds: tuple[int, int],
    *,
    longest: int,
    min_sentences: int,
    short_probability: float,
    num_samples: int | None,
    seed: int,
    cache: IndexCache | None,
) -> Integer[np.ndarray, "num_samples 3"]:
    """Build, or find in the cache, the samples of documents `bounds[0]` to `bounds[1]`."""

    def build() -> dict[str, np.ndarray]:
        try:
            samples = build_masked_index(
                source.lengths,
                source.documents[bounds[0] : bounds[1] + 1],
                longest=longest,
                min_sentences=min_sentences,
                short_probability=short_probability,
                num_samples=num_samples,
                seed=seed,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return {"samples": samples}

    name = f"{source.prefix}[{bounds[0]}:{bounds[1]}]"
    key = {
        "kind": "masked 1",
        "source": source.identity,
        "bounds": bounds,
        "longest": longest,
        "min_sentences": min_sentences,
        "short_probability": short_probability,
        "num_samples": num_samples,
        "seed": seed,
    }
    arrays = cache.get(name, key, build) if cache else build()
    return arrays["samples"]


def build_masked_index(
    lengths: Integer[np.ndarray, " num_sentences"],
    documents: Integer[np.ndarray, " num_bounds"],
    *,
    longest: int,
    min_sentences: int,
    short_probability: float,
    num_samples: int | None,
    seed: int,
) -> Integer[np.ndarray, "num_samples 3"]:
    """Return (first sentence, end, most tokens) of each sample, shuffled.

    Args:
        lengths: tokens of every sentence of the file.
        documents: first sentence of each document of the split, then the end of the last.
        longest: tokens of a sample without its special tokens, at least 2.
        min_sentences: sentences of a sample, 1 or 2.
        short_probability: share of samples that aim at fewer tokens than `longest`.
        num_samples: wanted; whole epochs are made, so there are usually more. None: one epoch.
        seed: of both generators.

    Raises:
        ValueError: samples are wanted and no document gives one.
    """
    # Megatron rounds to a whole number and takes every multiple of it.
    ratio = int(1 / short_probability + 0.5) if short_probability > 0 else 0
    epochs = 1 if num_samples is None else num_samples  # an epoch gives at least one sample
    wanted = num_samples or 0
    dtype = np.uint32 if len(lengths) <= np.iinfo(np.uint32).max else np.uint64
    fast = None
    if len(documents) > 1 and documents[-1] - documents[0] >= loops.WORTH_COMPILING:
        fast = loops.compiled(loops.cut_documents)
    if fast:
        rule = (ratio, longest, min_sentences, _LONG_SENTENCE)
        samples = _cut_fast(fast, documents, lengths, rule, seed, epochs, wanted, dtype)
    else:
        usable = _usable(lengths, documents, min_sentences)
        targets = _targets(ratio, longest, seed)
        samples = _cut(usable, lengths, targets, longest, min_sentences, epochs, wanted)
    if num_samples and not len(samples):
        raise ValueError(
            f"build_masked_index: none of {len(documents) - 1} documents has {min_sentences} or "
            f"more sentences of at most {_LONG_SENTENCE} tokens, and {num_samples} samples are "
            "wanted. Preprocess with --split-sentences, or give this split a larger share."
        )
    return samples.astype(dtype, copy=False).take(shuffled(len(samples), seed + 1), axis=0)


def _cut(
    usable: np.ndarray,
    lengths: np.ndarray,
    targets: Iterator[int],
    longest: int,
    min_sentences: int,
    epochs: int,
    wanted: int,
) -> np.ndarray:
    """Return the samples of whole epochs, at most `epochs`, until there are enough."""
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    full = _full_ends(ends, longest)
    found = array("q")
    for _ in range(epochs if len(usable) else 0):
        for first, last in usable.tolist():
            _cut_document(found, first, last, ends.data, full.data, targets, longest, min_sentences)
        if len(found) // 3 >= wanted:
            break
    return np.frombuffer(found, np.int64).reshape(-1, 3)


def _cut_fast(
    cut: Callable[..., tuple[int, int, int]],
    documents: np.ndarray,
    lengths: np.ndarray,
    rule: tuple[int, int, int, int],
    seed: int,
    epochs: int,
    wanted: int,
    dtype: type,
) -> np.ndarray:
    """Do what `_cut` does with a compiled loop, some documents at a time."""
    documents = np.require(documents, np.int64, ["ALIGNED"])  # which they are not in the file
    lengths = np.require(lengths, np.int32, ["ALIGNED"])
    total, most = len(documents) - 1, int(np.diff(documents).max()) + 1
    draws = _draws(seed)
    ready, parts, count = next(draws), [np.zeros((0, 3), dtype)], 0
    for _ in range(epochs):
        done, before = 0, count
        while done < total:
            while len(ready) < most:
                ready = np.append(ready, next(draws))
            out = np.empty((max(_DRAWN_AT_ONCE, most), 3), dtype)
            done, used, found = cut(documents, lengths, ready, *rule, done, out)
            ready = ready[used:] if done == total else np.append(ready[used:], next(draws))
            parts.append(out[:found])
            count += found
        if count >= wanted or count == before:
            break
    return np.concatenate(parts)


def _usable(lengths: np.ndarray, documents: np.ndarray, min_sentences: int) -> np.ndarray:
    """Return (first, end) of each document that may give samples."""
    first, last = documents[:-1].astype(np.int64), documents[1:].astype(np.int64)
    long = np.flatnonzero(lengths > _LONG_SENTENCE)
    any_long = np.searchsorted(long, last) > np.searchsorted(long, first)
    count = last - first
    return np.stack([first, last], 1)[(count >= min_sentences) & ~((count > 1) & any_long)]


def _full_ends(ends: np.ndarray, longest: int) -> np.ndarray:
    """Return for each sentence the end of the shortest run from there of `longest` tokens."""
    return np.searchsorted(ends, ends[:-1] + longest, side="left")


def _cut_document(
    found: array,
    first: int,
    last: int,
    ends: memoryview,
    full: memoryview,
    targets: Iterator[int],
    longest: int,
    min_sentences: int,
) -> None:
    """Append the samples of one document; none leaves a single sentence over."""
    while True:
        target = next(targets)
        if first == last:  # one draw follows the last sample, too
            return
        if target == longest:
            end = full[first]
        else:
            end = bisect_left(ends, ends[first] + target, first, last)
        end = max(end, first + min_sentences)
        if last - end <= 1:
            end = last
        found.extend((first, end, target))
        first = end


def _targets(ratio: int, longest: int, seed: int) -> Iterator[int]:
    """Yield how many tokens the next sample aims at."""
    if not ratio:
        yield from repeat(longest)
    for drawn in _draws(seed):
        wide = drawn.astype(np.int64)
        yield from np.where(wide % ratio == 0, 2 + wide % (longest - 1), longest).tolist()


def _draws(seed: int) -> Iterator[np.ndarray]:
    """Yield random numbers of 32 bits without end, many at a time."""
    # numpy's legacy seeding is that of C++'s mt19937, and a full range is its numbers as they are.
    random = np.random.RandomState(seed)
    while True:
        yield random.randint(0, 1 << 32, _DRAWN_AT_ONCE, np.uint32)
