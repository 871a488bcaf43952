"""From a config to samples: the text, its tokenizer, what is held out."""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer

from megatree.io.data import TokenDataset, encode_documents, load_demo, split_documents
from megatree.recipes.config import DataConfig, RunConfig
from megatree.recipes.words import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents and the tokenizer that reads them.

    Args:
        texts: one per document.
        tokenizer: turns them into ids.
        eod: id that ends a document.
    """

    texts: tuple[str, ...]
    tokenizer: Tokenizer
    eod: int


def load_text(cfg: DataConfig) -> Text:
    """Read the text and the tokenizer that a config names.

    Raises:
        ValueError: nothing is named, or a file is not what it should be.
        OSError: a file cannot be read.
    """
    if not cfg.text:
        raise ValueError(
            "data.text: this recipe brings no text. Set data.text to a .jsonl or .txt file and "
            "data.tokenizer to a tokenizer.json, or both to demo for the text inside the package."
        )
    tokenizer = load_tokenizer(cfg)
    texts = load_demo().texts if cfg.text == "demo" else _read_texts(Path(cfg.text))
    return Text(texts=texts, tokenizer=tokenizer, eod=end_of_document(cfg, tokenizer))


def load_tokenizer(cfg: DataConfig) -> Tokenizer:
    """Read the tokenizer that a config names.

    Raises:
        ValueError: none is named, or the file is no tokenizer.
        OSError: the file cannot be read.
    """
    if cfg.tokenizer == "demo":
        return load_demo().tokenizer
    path = Path(cfg.tokenizer)
    if not cfg.tokenizer or not path.exists():
        raise ValueError(
            f"data.tokenizer: {cfg.tokenizer!r} is no file. Give a tokenizer.json, a folder with "
            "vocab.json and merges.txt, or demo."
        )
    try:
        if path.is_dir():
            names = str(path / "vocab.json"), str(path / "merges.txt")
            return Tokenizer.from_str(ByteLevelBPETokenizer(*names).to_str())
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"data.tokenizer: {path} is no tokenizer ({error}). Give a tokenizer.json, or a folder "
            "with vocab.json and merges.txt."
        ) from None


def datasets(cfg: RunConfig) -> tuple[TokenDataset, TokenDataset | None]:
    """Return the samples to train on, and those held out (None if the config holds out nothing).

    Raises:
        ValueError: the vocabulary does not fit the model, or there is too little text.
        OSError: a file cannot be read.
    """
    text = load_text(cfg.data)
    entries = text.tokenizer.get_vocab_size()
    if entries > cfg.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: {cfg.model.vocab_size}, but the tokenizer has {entries} entries. "
            f"Set model.vocab_size to {entries}, or use a smaller tokenizer."
        )
    documents = encode_documents(text.texts, text.tokenizer, eod=text.eod)
    seq, seed = cfg.model.seq_length, cfg.train.seed
    if not cfg.data.valid_fraction:
        return TokenDataset(tokens=documents.tokens, seq=seq, seed=seed), None
    # Which documents are held out does not depend on the seed of the run: runs stay comparable.
    train, valid = split_documents(documents, valid_fraction=cfg.data.valid_fraction, seed=0)
    held_out = TokenDataset(tokens=valid.tokens, seq=seq, seed=0)
    if cfg.train.eval_samples > len(held_out):
        most = len(held_out) // cfg.train.microbatch * cfg.train.microbatch
        raise ValueError(
            f"train.eval_samples: {cfg.train.eval_samples}, but {len(held_out)} samples are held "
            f"out. Set train.eval_samples to at most {most}, or raise data.valid_fraction."
        )
    return TokenDataset(tokens=train.tokens, seq=seq, seed=seed), held_out


def end_of_document(cfg: DataConfig, tokenizer: Tokenizer) -> int:
    """Return the id that ends a document.

    Raises:
        ValueError: the tokenizer has no such entry.
    """
    found = tokenizer.token_to_id(cfg.eod)
    if found is None:
        near = did_you_mean(cfg.eod, tokenizer.get_vocab())
        raise ValueError(
            f"data.eod: the tokenizer has no entry {cfg.eod!r}{near}. "
            "Name the entry that ends a document."
        )
    return found


def _read_texts(path: Path) -> tuple[str, ...]:
    text = _read(path)
    name = path.name.removesuffix(".xz")
    if name.endswith(".txt"):
        return (text,)
    if not name.endswith(".jsonl"):
        raise ValueError(f"data.text: {path} is neither .jsonl nor .txt. Convert or rename it.")
    texts = []
    # Not splitlines: JSON may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}:{number}: no JSON object with a "text". Write one document per line, '
                'as {"text": "..."}.'
            ) from None
    return tuple(texts)


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"data.text: {path} is no UTF-8 text ({error}). Convert it.") from None
