"""Samples for BERT: one or two runs of sentences with hidden words, equal to Megatron's."""

from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np
from jaxtyping import Int64, Integer

from megatree.io.data.cache import IndexCache
from megatree.io.data.dataset import Batch, check_ids, digest, select_columns
from megatree.io.data.masked_index import masked_index
from megatree.io.data.masking import Masking, choose_spans
from megatree.io.data.sequences import Sequences, read_sequences

_MASKED = 0.8  # of the hidden tokens; half of the others become a random token, half stay


@dataclass(frozen=True, kw_only=True, eq=False)
class BertOptions:
    """How samples are made.

    Attributes:
        seq: tokens of a row, special ones included.
        cls, sep, mask, pad: ids of the special tokens.
        random_ids: ids that may replace a hidden token, ascending: the whole vocabulary.
        masking: how words are hidden.
        sentences: "pair" for two runs in drawn order (the model predicts whether they were
            swapped), "single" for one.
        short_probability: share of samples that aim at fewer tokens than fit.
        seed: of all draws.
    """

    seq: int
    cls: int
    sep: int
    mask: int
    pad: int
    random_ids: Int64[np.ndarray, " vocab"]
    masking: Masking = field(default_factory=Masking)
    sentences: Literal["pair", "single"] = "pair"
    short_probability: float = 0.1
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.seq < 5:
            raise ValueError(
                f"BertOptions: seq {self.seq} holds no two tokens beside [CLS] and two [SEP]. "
                "Use at least 5."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class BertSample:
    """One sample before padding.

    Attributes:
        tokens: with words hidden.
        labels: the true ids.
        hidden: positions that are to be predicted, ascending.
        second: first position of the second run.
        swapped: whether the runs changed places.
        truncated: whether tokens were cut off.
    """

    tokens: list[int]
    labels: list[int]
    hidden: list[int]
    second: int
    swapped: bool
    truncated: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class BertDataset:
    """Samples of one split of one file of sentences.

    Attributes:
        source: the sentences.
        index: (first sentence, end, most tokens) of each sample.
        options: how samples are made.
        name: of the split and file, for messages.
    """

    source: Sequences
    index: Integer[np.ndarray, "num_samples 3"]
    options: BertOptions
    name: str = "BertDataset"

    def __len__(self) -> int:
        return len(self.index)

    @property
    def identity(self) -> str:
        """Digest of source, options and index."""
        o = self.options
        return digest(
            kind="bert",
            source=self.source.identity,
            ids=[o.seq, o.cls, o.sep, o.mask, o.pad, len(o.random_ids), o.seed],
            masking=o.masking.describe(),
            sentences=o.sentences,
            index=[len(self.index), *self.index[:4].ravel().tolist()],
        )

    def verify(self) -> None:
        """Raise a ValueError if the file changed."""
        self.source.verify()

    def rows(
        self,
        ids: Integer[np.ndarray, " n"],
        columns: Integer[np.ndarray, " t"] | None = None,
    ) -> Batch:
        """Return samples as arrays [n, seq].

        `tokens`, `labels` (the true ids where a word is hidden, else 0), `weights` (1 there),
        `types` (0 or 1: which run), `padding` (1 for real tokens), and `swapped` [n, 1].
        """
        check_ids(self.name, ids, len(self))
        shape = len(ids), self.options.seq
        names = ("labels", "types", "padding")
        out: Batch = {name: np.zeros(shape, np.int64) for name in names}
        out["tokens"] = np.full(shape, self.options.pad, np.int64)
        out["weights"] = np.zeros(shape, np.float32)
        swapped = np.zeros((len(ids), 1), np.int64)
        for row, sample_id in enumerate(ids.tolist()):
            sample = self.sample(sample_id)
            n = len(sample.tokens)
            out["tokens"][row, :n] = sample.tokens
            out["types"][row, sample.second : n] = 1
            out["padding"][row, :n] = 1
            out["labels"][row, sample.hidden] = np.array(sample.labels)[sample.hidden]
            out["weights"][row, sample.hidden] = 1
            swapped[row] = sample.swapped
        return {**select_columns(out, columns), "swapped": swapped}

    def sample(self, sample_id: int) -> BertSample:
        """Make one sample; its draws depend on (seed, sample_id) only."""
        options = self.options
        first, end, target = (int(x) for x in self.index[sample_id])
        sentences = [part.tolist() for part in read_sequences(self.source, first, end)]
        random = np.random.RandomState((options.seed + sample_id) % (1 << 32))
        runs, swapped = _runs(sentences, random, options.sentences)
        runs, truncated = _truncate(runs, target, random)
        tokens = [options.cls, *runs[0], options.sep]
        second = len(tokens)
        if runs[1]:
            tokens += [*runs[1], options.sep]
        masked = list(tokens)

        def hide(position: int) -> None:
            if random.random_sample() < _MASKED:
                masked[position] = options.mask
            elif random.random_sample() >= 0.5:
                masked[position] = int(options.random_ids[random.randint(len(options.random_ids))])

        spans = choose_spans(
            np.array(tokens),
            options.masking,
            target=target,
            special=(options.cls, options.sep),
            random=random,
            hide=hide,
        )
        return BertSample(
            tokens=masked,
            labels=tokens,
            hidden=sorted(position for span in spans for position in span),
            second=second,
            swapped=swapped,
            truncated=truncated,
        )


def bert_dataset(
    source: Sequences,
    bounds: tuple[int, int],
    options: BertOptions,
    *,
    num_samples: int | None,
    cache: IndexCache | None = None,
) -> BertDataset:
    """Build, or find in the cache, the index of a split and return its samples.

    Args:
        source: sentences as sequences, grouped into documents.
        bounds: first document and end of the split.
        options: how samples are made.
        num_samples: samples wanted; there will be whole epochs of them. None: one epoch.
        cache: keeps the index on disk.

    Raises:
        ValueError: samples are wanted and the split gives none.
    """
    index = masked_index(
        source,
        bounds,
        longest=options.seq - 3,
        min_sentences=2 if options.sentences == "pair" else 1,
        short_probability=options.short_probability,
        num_samples=num_samples,
        seed=options.seed,
        cache=cache,
    )
    name = f"{source.prefix}[{bounds[0]}:{bounds[1]}]"
    return BertDataset(source=source, index=index, options=options, name=name)


def _runs(
    sentences: list[list[int]], random: np.random.RandomState, kind: Literal["pair", "single"]
) -> tuple[list[list[int]], bool]:
    """Return the two runs of tokens (the second may be empty) and whether they changed places."""
    if kind == "single":
        return [list(chain(*sentences)), []], False
    pivot = int(random.randint(1, len(sentences))) if len(sentences) >= 3 else 1
    runs = [list(chain(*sentences[:pivot])), list(chain(*sentences[pivot:]))]
    if random.random_sample() < 0.5:
        return runs[::-1], True
    return runs, False


def _truncate(
    runs: list[list[int]], target: int, random: np.random.RandomState
) -> tuple[list[list[int]], bool]:
    """Drop tokens of the longer run, from front or back by chance, until `target` are left."""
    excess = len(runs[0]) + len(runs[1]) - target
    cut = [[0, len(run)] for run in runs]
    for _ in range(max(excess, 0)):
        longer = cut[0] if cut[0][1] - cut[0][0] > cut[1][1] - cut[1][0] else cut[1]
        if random.random_sample() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return [run[a:b] for run, (a, b) in zip(runs, cut, strict=True)], excess > 0
