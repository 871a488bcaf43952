"""Samples for T5: a text whose spans are replaced by sentinels, and the spans to write back."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Integer

from megatree.io.data.cache import IndexCache
from megatree.io.data.dataset import Batch, check_ids, digest, select_columns
from megatree.io.data.masked_index import masked_index
from megatree.io.data.masking import Masking, choose_spans
from megatree.io.data.sequences import Sequences, read_sequences


@dataclass(frozen=True, kw_only=True, eq=False)
class T5Options:
    """How samples are made.

    Attributes:
        seq: tokens of an encoder row.
        decoder_seq: tokens of a decoder row.
        bos, eos, pad: ids of the special tokens.
        sentinels: ids that stand for the spans, in order.
        special: ids that are never hidden.
        masking: how spans are chosen.
        short_probability: share of samples that aim at fewer tokens than fit.
        seed: of all draws.
    """

    seq: int
    decoder_seq: int
    bos: int
    eos: int
    pad: int
    sentinels: tuple[int, ...]
    special: tuple[int, ...] = ()
    masking: Masking = field(default_factory=lambda: Masking(max_ngram=10, ngrams="geometric"))
    short_probability: float = 0.1
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.seq < 4 or self.decoder_seq < 3 or not self.sentinels:
            raise ValueError(
                f"T5Options: seq {self.seq}, decoder_seq {self.decoder_seq} and "
                f"{len(self.sentinels)} sentinels hold no span. Use at least 4, 3 and 1."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class T5Sample:
    """One sample before padding.

    Attributes:
        encoder: the text with sentinels.
        decoder: bos, then each sentinel with what it stands for; its shift by one is the label.
        labels: the decoder's tokens one later, then eos.
        truncated: whether tokens were cut off.
    """

    encoder: list[int]
    decoder: list[int]
    labels: list[int]
    truncated: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class T5Dataset:
    """Samples of one split of one file of sentences.

    Attributes:
        source: the sentences.
        index: (first sentence, end, most tokens) of each sample.
        options: how samples are made.
        name: of the split and file, for messages.
    """

    source: Sequences
    index: Integer[np.ndarray, "num_samples 3"]
    options: T5Options
    name: str = "T5Dataset"

    def __len__(self) -> int:
        return len(self.index)

    @property
    def identity(self) -> str:
        """Digest of source, options and index."""
        o = self.options
        return digest(
            kind="t5",
            source=self.source.identity,
            ids=[o.seq, o.decoder_seq, o.bos, o.eos, o.pad, *o.sentinels, o.seed, *o.special],
            masking=o.masking.describe(),
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
        """Return samples: `encoder_tokens`, `encoder_padding` [n, seq], and [n, decoder_seq] of

        `tokens`, `labels`, `weights` and `padding` (1 for real tokens). `columns` cuts the latter.
        """
        check_ids(self.name, ids, len(self))
        o = self.options
        encoder = {
            "encoder_tokens": np.full((len(ids), o.seq), o.pad, np.int64),
            "encoder_padding": np.zeros((len(ids), o.seq), np.int64),
        }
        decoder = {
            "tokens": np.full((len(ids), o.decoder_seq), o.pad, np.int64),
            "labels": np.zeros((len(ids), o.decoder_seq), np.int64),
            "weights": np.zeros((len(ids), o.decoder_seq), np.float32),
            "padding": np.zeros((len(ids), o.decoder_seq), np.int64),
        }
        for row, sample_id in enumerate(ids.tolist()):
            sample = self.sample(sample_id)
            n, m = len(sample.encoder), len(sample.decoder)
            encoder["encoder_tokens"][row, :n] = sample.encoder
            encoder["encoder_padding"][row, :n] = 1
            decoder["tokens"][row, :m] = sample.decoder
            decoder["labels"][row, :m] = sample.labels
            decoder["weights"][row, :m] = 1
            decoder["padding"][row, :m] = 1
        return {**encoder, **select_columns(decoder, columns)}

    def sample(self, sample_id: int) -> T5Sample:
        """Make one sample; its draws depend on (seed, sample_id) only.

        Spans for which sentinels or decoder tokens run out stay in the text (Megatron stops with
        an IndexError or an assertion there).
        """
        o = self.options
        first, end, target = (int(x) for x in self.index[sample_id])
        text = np.concatenate(read_sequences(self.source, first, end))
        tokens = text[:target].tolist()
        spans = choose_spans(
            np.array(tokens, np.int64),
            o.masking,
            target=target,
            special=o.special,
            random=np.random.RandomState((o.seed + sample_id) % (1 << 32)),
        )
        encoder: list[int] = []
        decoder = [o.bos]
        at = 0
        for sentinel, span in zip(o.sentinels, spans, strict=False):
            if len(decoder) + 1 + len(span) > o.decoder_seq:
                break
            encoder += [*tokens[at : span[0]], sentinel]
            decoder += [sentinel, *(tokens[position] for position in span)]
            at = span[-1] + 1
        encoder += tokens[at:]
        return T5Sample(
            encoder=encoder,
            decoder=decoder,
            labels=[*decoder[1:], o.eos],
            truncated=len(text) > len(tokens),
        )


def t5_dataset(
    source: Sequences,
    bounds: tuple[int, int],
    options: T5Options,
    *,
    num_samples: int | None,
    cache: IndexCache | None = None,
) -> T5Dataset:
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
        longest=options.seq - 2,
        min_sentences=1,
        short_probability=options.short_probability,
        num_samples=num_samples,
        seed=options.seed,
        cache=cache,
    )
    name = f"{source.prefix}[{bounds[0]}:{bounds[1]}]"
    return T5Dataset(source=source, index=index, options=options, name=name)
