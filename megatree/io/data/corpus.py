"""From names of files and a split to the datasets of training, validation and test."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

from megatree.io.data.bert import BertOptions, bert_dataset
from megatree.io.data.cache import IndexCache
from megatree.io.data.dataset import Dataset
from megatree.io.data.fim import FillInMiddle
from megatree.io.data.gpt import GPTOptions, gpt_dataset
from megatree.io.data.indexed import IndexedFile
from megatree.io.data.mixture import Blend, Corpus, Data, Leaf, NumSamples, Splits, build_splits
from megatree.io.data.packed import TooLong, packed_dataset
from megatree.io.data.sequences import Sequences
from megatree.io.data.shuffled import Shuffled
from megatree.io.data.splits import SPLITS, split_bounds
from megatree.io.data.t5 import T5Options, t5_dataset


def parse_blend(words: Sequence[str], *, split: str = "969,30,1") -> Corpus | Blend:
    """Read what Megatron's --data-path takes: one prefix, prefixes, or weight and prefix in turn.

    Raises:
        ValueError: there is no word, or weights stand for some prefixes only.

    >>> parse_blend(["0.3", "a", "0.7", "b"]).weights
    (0.3, 0.7)
    """
    firsts, seconds = words[::2], words[1::2]
    numbers = [_number(word) for word in firsts]
    if len(words) % 2 == 0 and words and all(number is not None for number in numbers):
        weights = tuple(number for number in numbers if number is not None)
        parts = tuple(Corpus(prefix=prefix, split=split) for prefix in seconds)
        return Blend(parts=parts, weights=weights)
    if not words or any(number is not None for number in numbers):
        raise ValueError(
            f"data path {' '.join(words)!r}: is not one prefix, a list of prefixes, or weights "
            "and prefixes in turn. Write it like: 0.3 first 0.7 second."
        )
    parts = tuple(Corpus(prefix=prefix, split=split) for prefix in words)
    return parts[0] if len(parts) == 1 else Blend(parts=parts)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def gpt_datasets(
    data: Data,
    options: GPTOptions,
    *,
    num_samples: NumSamples,
    keep_partial: bool = False,
    fim: FillInMiddle | None = None,
    cache: IndexCache | None = None,
    open_file: Callable[[str], Sequences] = IndexedFile,
) -> Splits:
    """Build the GPT datasets of train, valid and test; sequences are split.

    Args:
        data: one corpus or blend that is split, or one for each split, used whole.
        options: how rows are made; the same for all.
        num_samples: wanted of each split. None: one epoch; a blend by weights needs a number.
        keep_partial: keep the last sample of the validation split though it may be short.
        fim: rearranges documents for infilling; in the training split only.
        cache: keeps indices on disk.
        open_file: prefix -> its sequences; called once for each.

    Returns:
        A dataset, or None where the split has no share.

    Raises:
        ValueError: a file is damaged, or samples are wanted of a split that holds none.
    """

    def make(source: Sequences, bounds: tuple[int, int], split: int, wanted: int | None) -> Dataset:
        return gpt_dataset(
            source,
            bounds,
            options,
            num_samples=wanted,
            keep_partial=keep_partial and SPLITS[split] == "valid",
            fim=fim if SPLITS[split] == "train" else None,
            cache=cache,
        )

    leaf = _leaf(_count_sequences, "sequences", make, open_file)
    return build_splits(data, leaf, num_samples, cache)


def packed_datasets(
    data: Data,
    seq: int,
    *,
    seed: int,
    num_samples: NumSamples,
    chats: bool = False,
    packing: Literal["packed", "single"] = "packed",
    too_long: TooLong = "stop",
    vocab_size: int | None = None,
    cache: IndexCache | None = None,
    open_file: Callable[[str], Sequences] = IndexedFile,
) -> Splits:
    """Lay the sequences of train, valid and test into rows, in a shuffled order.

    Args:
        data: as in `gpt_datasets`; sequences are split.
        seq: columns of a row.
        seed: of the order.
        num_samples: wanted of each split; None: one epoch.
        chats: whether a corpus is what `encode_chats` wrote: `_tokens` and `_learned`.
        packing: several sequences in a row where they fit, or one.
        too_long: what to do with a sequence of more than seq + 1 tokens.
        vocab_size: ids at or above it are an error; not checked if None.
        cache: keeps the orders of blends on disk.
        open_file: prefix of a pair -> its sequences.

    Returns and raises what `gpt_datasets` does.
    """

    def make(source: Sequences, bounds: tuple[int, int], split: int, wanted: int | None) -> Dataset:
        learned = None
        if chats:
            learned = open_file(f"{source.prefix.removesuffix('_tokens')}_learned")
        rows = packed_dataset(
            source,
            seq,
            bounds=bounds,
            learned=learned,
            packing=packing,
            too_long=too_long,
            vocab_size=vocab_size,
        )
        return Shuffled(dataset=rows, seed=seed, count=wanted)

    def open_tokens(prefix: str) -> Sequences:
        return open_file(f"{prefix}_tokens" if chats else prefix)

    leaf = _leaf(_count_sequences, "sequences", make, open_tokens)
    return build_splits(data, leaf, num_samples, cache)


def bert_datasets(
    data: Data,
    options: BertOptions,
    *,
    num_samples: NumSamples,
    cache: IndexCache | None = None,
) -> Splits:
    """Build the BERT datasets of train, valid and test; documents are split.

    Arguments, result and errors are those of `gpt_datasets`.
    """

    def make(source: Sequences, bounds: tuple[int, int], split: int, wanted: int | None) -> Dataset:
        return bert_dataset(source, bounds, options, num_samples=wanted, cache=cache)

    leaf = _leaf(_count_documents, "documents", make, IndexedFile)
    return build_splits(data, leaf, num_samples, cache)


def t5_datasets(
    data: Data,
    options: T5Options,
    *,
    num_samples: NumSamples,
    cache: IndexCache | None = None,
) -> Splits:
    """Build the T5 datasets of train, valid and test; documents are split.

    Arguments, result and errors are those of `gpt_datasets`.
    """

    def make(source: Sequences, bounds: tuple[int, int], split: int, wanted: int | None) -> Dataset:
        return t5_dataset(source, bounds, options, num_samples=wanted, cache=cache)

    leaf = _leaf(_count_documents, "documents", make, IndexedFile)
    return build_splits(data, leaf, num_samples, cache)


def _count_sequences(source: Sequences) -> int:
    return len(source.lengths)


def _count_documents(source: Sequences) -> int:
    return len(source.documents) - 1


def _leaf(
    count: Callable[[Sequences], int],
    what: str,
    make: Callable[[Sequences, tuple[int, int], int, int | None], Dataset],
    open_file: Callable[[str], Sequences],
) -> Leaf:
    """Return what makes the dataset of one corpus, each file opened once."""
    open_once = functools.cache(open_file)

    def leaf(corpus: Corpus, split: int, wanted: int | None) -> Dataset | None:
        source = open_once(corpus.prefix)
        total = count(source)
        bounds = split_bounds(corpus.split, total)[split]
        if wanted and (bounds is None or bounds[0] == bounds[1]):
            raise ValueError(
                f"{corpus.prefix}: split {corpus.split!r} of {total} {what} leaves none for "
                f"{SPLITS[split]}, and {wanted} samples are wanted. Give it a larger share, or "
                "ask for 0 samples."
            )
        return None if bounds is None else make(source, bounds, split, wanted)

    return leaf
