"""Train a tokenizer on texts and store it in the files that its kind is read from."""

import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatree.io.data.atomic import atomic_write
from megatree.io.data.bpe import EOD, train_byte_bpe
from megatree.io.optional import optional
from megatree.io.tokenizers.bert import OWN
from megatree.io.tokenizers.protocol import Tokenizer
from megatree.io.tokenizers.spec import TokenizerSpec, load_tokenizer

Algorithm = Literal["byte-bpe", "wordpiece", "sentencepiece-bpe", "sentencepiece-unigram"]
Texts = Callable[[], Iterable[str]]

_LARGEST_ALPHABET = 1000


def train_tokenizer(
    texts: Texts,
    folder: Path,
    *,
    algorithm: Algorithm,
    vocab_size: int,
    lowercase: bool = True,
) -> tuple[TokenizerSpec, Tokenizer]:
    """Train on `texts` and write the vocabulary into `folder`; the same texts give the same files.

    byte-bpe writes tokenizer.json, its roles, and vocab.json with merges.txt (GPT-2's files);
    wordpiece writes vocab.txt; the sentencepiece ones write tokenizer.model.

    Args:
        texts: gives the texts as a stream; called once, for wordpiece twice.
        folder: made if it is missing.
        algorithm: what to train.
        vocab_size: entries in all.
        lowercase: wordpiece: fold case.

    Returns:
        How to load it, and the tokenizer as loaded from the files.

    Raises:
        ValueError: if the folder holds a vocabulary already, or the texts are too few.
    """
    names = ["tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"]
    found = [name for name in names if (folder / name).exists()]
    if found:
        raise ValueError(
            f"{folder}: {', '.join(found)} already there. Name another folder, or remove them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if algorithm == "byte-bpe":
        _byte_bpe(texts(), folder, vocab_size)
        spec = TokenizerSpec(kind="hf", path=folder)
    elif algorithm == "wordpiece":
        _wordpiece(texts, folder, vocab_size, lowercase)
        spec = TokenizerSpec(kind="bert", path=folder, lowercase=lowercase)
    else:
        model = "bpe" if algorithm.endswith("bpe") else "unigram"
        _sentencepiece(texts(), folder, vocab_size, model)
        spec = TokenizerSpec(kind="sentencepiece", path=folder)
    return spec, load_tokenizer(spec)


def _byte_bpe(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    trained = train_byte_bpe(texts, vocab_size)
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD, "bos_token": EOD}
    model = json.loads(trained.to_str())["model"]
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    _write(folder / "tokenizer_config.json", json.dumps(roles, indent=1))
    _write(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    _write(folder / "merges.txt", "#version: 0.2\n" + merges)
    _write(folder / "tokenizer.json", trained.to_str(pretty=True))


def _wordpiece(texts: Texts, folder: Path, vocab_size: int, lowercase: bool) -> None:
    backend = Backend(models.WordPiece(unk_token=OWN["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(backend.normalizer.normalize_str(text))
    # The trainer numbers the letters that continue a word in the order of a hash table, which
    # differs from run to run, and breaks ties by number. Given as special, they are in our order.
    first = [*OWN.values(), *_alphabet(counts)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=first, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    vocab = backend.get_vocab()
    if len(vocab) != vocab_size:
        raise ValueError(
            f"train-tokenizer: the texts give {len(vocab)} of {vocab_size} entries. "
            f"Add text, or set vocab_size to {len(vocab)}."
        )
    entries = sorted(vocab, key=vocab.__getitem__)
    _write(folder / "vocab.txt", "".join(f"{entry}\n" for entry in entries))


def _alphabet(counts: Counter[str]) -> list[str]:
    """Return the letters that start a word, then those that continue one, each in order."""
    printed = {letter: count for letter, count in counts.items() if not letter.isspace()}
    common = sorted(printed, key=lambda letter: (-printed[letter], letter))[:_LARGEST_ALPHABET]
    return sorted(common) + [f"##{letter}" for letter in sorted(common) if _continues(letter)]


def _continues(letter: str) -> bool:
    """Whether a letter can follow another in a word: punctuation and ideographs stand alone."""
    if letter.isascii():
        return letter.isalnum()
    ideograph = unicodedata.name(letter, "").startswith("CJK")
    return not ideograph and not unicodedata.category(letter).startswith("P")


def _sentencepiece(texts: Iterable[str], folder: Path, vocab_size: int, model: str) -> None:
    library = optional("sentencepiece", extra="data", purpose=f"train-tokenizer ({model})")
    written = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=vocab_size,
            model_type=model,
            byte_fallback=True,
            num_threads=1,  # with more, ties break differently from run to run
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"train-tokenizer: sentencepiece refuses vocab_size {vocab_size}: {error}. "
            "Add text, or lower vocab_size."
        ) from error
    with atomic_write(folder / "tokenizer.model") as file:
        file.write(written.getvalue())


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
