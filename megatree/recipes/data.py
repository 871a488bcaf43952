"""From a config to samples: which files, what is held out, in which order."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatree.io.data import (
    Blend,
    Corpus,
    Dataset,
    Documents,
    FillInMiddle,
    GPTOptions,
    IndexCache,
    IndexedFile,
    MockSequences,
    Sequences,
    Stream,
    encode_documents,
    gpt_datasets,
    packed_datasets,
    parse_blend,
)
from megatree.io.data.first_rank import on_first_rank
from megatree.io.data.mixture import Data, NumSamples, Splits
from megatree.io.world import World
from megatree.recipes.config import RunConfig
from megatree.recipes.data_config import DataConfig
from megatree.recipes.text import read_texts
from megatree.recipes.vocabulary import Vocabulary, find_vocabulary, load_tokenizer
from megatree.runtime.agreement import check_agreement

IN_MEMORY = "the text"


@dataclass(frozen=True, kw_only=True, eq=False)
class RunData:
    """The samples of a run.

    Args:
        train: to learn from.
        valid: to evaluate on, the same samples every time; None if nothing is held out.
        vocabulary: what is known of the tokenizer behind the ids.
        samples: training samples that the order was made for.
    """

    train: Stream
    valid: Stream | None
    vocabulary: Vocabulary
    samples: int


def open_data(cfg: RunConfig, world: World, *, samples: int) -> RunData:
    """Open the data of a run; every rank calls it.

    One rank encodes a text, reads the tokenizer and builds the indices; the others wait.

    Args:
        cfg: the run.
        world: its processes.
        samples: training samples that the order is made for.

    Raises:
        ValueError: nothing is named, files and tokenizer or model do not fit each other, a file is
            damaged, or too little is there.
        TimeoutError: the one rank took longer than the deadline.
        OSError: a file cannot be read.
    """
    data = cfg.data
    pairs = world.agree(lambda: _pairs(data))
    opened = world.agree(lambda: {prefix: IndexedFile(prefix) for prefix in pairs})
    # Before any index is built: ranks with different files would wait for different ones.
    check_agreement(world, {f"data.{name}": file.identity for name, file in opened.items()})
    vocabulary = world.broadcast(world.on_first(lambda: _vocabulary(cfg, pairs)))
    files: dict[str, Sequences] = {**opened, **_in_memory(cfg, world, vocabulary)}
    tree = world.agree(lambda: _tree(data))
    cache = _cache(cfg, world)
    wanted = (samples, _held_out_samples(cfg, tree), 0)
    if data.kind == "gpt":
        train, valid, _ = _gpt(cfg, tree, wanted, vocabulary, files, cache)
    else:
        train, valid, _ = packed_datasets(
            tree,
            cfg.model.seq_length,
            seed=data.seed,
            num_samples=wanted,
            chats=data.kind == "chat",
            packing=data.packing,
            too_long=data.too_long,
            vocab_size=cfg.model.vocab_size,
            cache=cache,
            open_file=files.__getitem__,
        )
    if train is None:
        raise ValueError(f"data.split: {data.split!r} leaves nothing to train on. Raise the first.")
    held_out = None if valid is None or not len(valid) else Stream(dataset=valid)
    world.agree(lambda: _check_sizes(cfg, train, held_out))
    return RunData(
        train=Stream(dataset=train, seed=data.seed, stored_first=True),
        valid=held_out,
        vocabulary=vocabulary,
        samples=samples,
    )


def _pairs(data: DataConfig) -> tuple[str, ...]:
    """Return the prefix of every pair of files that is read, each once."""
    if not data.prefix:
        if not data.text:
            raise ValueError(
                "data: this recipe brings no data. Set data.prefix to what `megatree data "
                "preprocess` wrote, or data.text to a small .jsonl or .txt file, or to demo for "
                "the text inside the package."
            )
        return ()
    prefixes = [
        corpus.prefix
        for words in (data.prefix, data.valid_prefix)
        if words
        for corpus in _corpora(parse_blend(words))
    ]
    parts = ("_tokens", "_learned") if data.kind == "chat" else ("",)
    return tuple(dict.fromkeys(f"{prefix}{part}" for prefix in prefixes for part in parts))


def _corpora(tree: Corpus | Blend) -> list[Corpus]:
    if isinstance(tree, Corpus):
        return [tree]
    return [corpus for part in tree.parts for corpus in _corpora(part)]


def _tree(data: DataConfig) -> Data:
    """Return the corpora of a config, and how they are blended and split."""
    if not data.prefix:
        return Corpus(prefix=IN_MEMORY, split=data.split)
    tree = parse_blend(data.prefix, split=data.split)
    if data.epochs:
        if not isinstance(tree, Blend) or tree.weights is not None:
            raise ValueError(
                f"data.epochs: {len(data.epochs)} numbers, and data.prefix is no list of prefixes "
                "without weights. Name several, or leave data.epochs out."
            )
        tree = replace(tree, epochs=data.epochs)
    if data.valid_prefix:
        return (tree, parse_blend(data.valid_prefix), None)
    return tree


def _vocabulary(cfg: RunConfig, pairs: tuple[str, ...]) -> Vocabulary:
    """Return what is known of the vocabulary, and refuse a model that it does not fit."""
    entries = cfg.model.vocab_size
    if cfg.data.text == "mock":
        return Vocabulary(identity=None, size=entries, eod=entries - 1)
    learned = {
        prefix for prefix in pairs if cfg.data.kind == "chat" and prefix.endswith("_learned")
    }
    found = find_vocabulary(cfg.data, tuple(p for p in pairs if p not in learned))
    if found.size is not None and found.size > entries:
        raise ValueError(
            f"model.vocab_size: {entries}, but the tokenizer has {found.size} entries. "
            f"Set model.vocab_size to {found.size}, or use a smaller tokenizer."
        )
    looks = [
        name
        for name in ("reset_positions", "reset_attention", "eod_mask_loss", "fim_rate")
        if getattr(cfg.data, name)
    ]
    if looks and found.eod is None:
        raise ValueError(
            f"data.{looks[0]}: looks for the end of a document, and nothing tells its id. "
            "Name the tokenizer in data.tokenizer, and its entry in data.eod."
        )
    return found


def _in_memory(cfg: RunConfig, world: World, vocabulary: Vocabulary) -> Mapping[str, Sequences]:
    """Return the sequences of a small text, which rank 0 encodes for all."""
    data = cfg.data
    if not data.text:
        return {}
    if data.text == "mock":
        return {
            IN_MEMORY: MockSequences(vocab_size=cfg.model.vocab_size, eod=cfg.model.vocab_size - 1)
        }
    made: list[Documents] = []

    def encode() -> None:
        made.append(encode_documents(read_texts(data.text), load_tokenizer(data)))

    on_first_rank(world, f"the tokens of {data.text}", encode, deadline_s=data.deadline_s)
    told = world.broadcast((made[0].tokens, made[0].lengths) if made else None)
    return {IN_MEMORY: Documents(tokens=told[0], lengths=told[1], prefix=data.text)}


def _gpt(
    cfg: RunConfig,
    tree: Data,
    wanted: NumSamples,
    vocabulary: Vocabulary,
    files: Mapping[str, Sequences],
    cache: IndexCache | None,
) -> Splits:
    data = cfg.data
    options = GPTOptions(
        seq=cfg.model.seq_length,
        seed=data.seed,
        eod=vocabulary.eod,
        positions="eod" if data.reset_positions else "row",
        segments="eod" if data.reset_attention else "row",
        eod_loss=not data.eod_mask_loss,
        vocab_size=cfg.model.vocab_size,
    )
    fim = None
    if data.fim_rate:
        assert vocabulary.eod is not None, "checked with the vocabulary"
        prefix, middle, suffix = vocabulary.marks
        fim = FillInMiddle(
            prefix=prefix,
            middle=middle,
            suffix=suffix,
            eod=vocabulary.eod,
            rate=data.fim_rate,
            seed=data.seed,
        )
    return gpt_datasets(
        tree,
        options,
        num_samples=wanted,
        fim=fim,
        cache=cache,
        open_file=files.__getitem__,
    )


def _held_out_samples(cfg: RunConfig, tree: Data) -> int | None:
    """Return how many validation samples to make: one epoch, where there is such a thing."""
    if not cfg.train.eval_samples:
        return 0
    valid = tree if isinstance(tree, Corpus | Blend) else tree[1]
    weighted = isinstance(valid, Blend) and valid.weights is not None
    return cfg.train.eval_samples if weighted else None


def _cache(cfg: RunConfig, world: World) -> IndexCache | None:
    folder = cfg.data.cache or (cfg.checkpoint.dir and str(Path(cfg.checkpoint.dir) / "index"))
    if not folder:
        return None
    return IndexCache(folder=Path(folder), world=world, deadline_s=cfg.data.deadline_s)


def _check_sizes(cfg: RunConfig, train: Dataset, valid: Stream | None) -> None:
    wanted = cfg.train.eval_samples
    if not len(train):
        raise ValueError(
            f"data: the training documents hold no sample of {cfg.model.seq_length} + 1 tokens. "
            "Add documents, or lower model.seq_length."
        )
    held_out = len(valid.dataset) if valid else 0
    if wanted > held_out:
        most = held_out // cfg.train.microbatch * cfg.train.microbatch
        fewer = f"Set train.eval_samples to at most {most}"
        if not most:
            fewer = "Set train.eval_every and train.eval_samples to 0"
        raise ValueError(
            f"train.eval_samples: {wanted}, but {held_out} samples are held out. "
            f"{fewer}, or raise the second number of data.split."
        )
