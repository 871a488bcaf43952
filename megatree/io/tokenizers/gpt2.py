"""GPT-2's byte-level BPE from its two files, vocab.json and merges.txt."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatree.io.tokenizers.fast import FastTokenizer
from megatree.io.tokenizers.identity import digest
from megatree.io.tokenizers.special import Special

END_OF_TEXT = "<|endoftext|>"


def load_gpt2(vocab: Path, merges: Path, *, eod: str = END_OF_TEXT) -> FastTokenizer:
    """Return the tokenizer of a vocabulary and its merges; no space is added before a text.

    Args:
        vocab: JSON object of spelling -> id.
        merges: a line per merge, most frequent first; a first line `#version` is skipped.
        eod: spelling of the token that ends a document.

    Raises:
        ValueError: if the files are not these two, disagree, or lack a byte or `eod`.
    """
    entries = _read_vocab(vocab)
    pairs = _read_merges(merges)
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - entries.keys())
    if missing:
        # The library drops a byte that has no entry without a word.
        raise ValueError(
            f"{vocab}: {len(missing)} of 256 bytes have no entry (the first: {missing[0]!r}). "
            "Use the vocabulary of a byte-level BPE."
        )
    if eod not in entries:
        raise ValueError(
            f"{vocab}: it has no entry {eod!r} to end documents with. "
            "Name one of its entries as eod."
        )
    try:
        backend = Tokenizer(models.BPE(entries, pairs))
    except Exception as error:
        raise ValueError(
            f"{merges}: it does not fit {vocab}: {error}. Use two files of one vocabulary."
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(eod, special=True)])
    special = Special(eod=entries[eod], eos=entries[eod])
    identity = digest("gpt2", {"vocab": entries, "merges": pairs}, special)
    return FastTokenizer(backend=backend, special=special, identity=identity)


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: it is no JSON object of spelling -> id: {error}. Give a vocab.json."
        ) from error
    if not isinstance(entries, dict) or not all(type(token) is int for token in entries.values()):
        raise ValueError(f"{path}: it is no JSON object of spelling -> id. Give a vocab.json.")
    if len(set(entries.values())) < len(entries):
        raise ValueError(
            f"{path}: {len(entries)} entries share {len(set(entries.values()))} ids. "
            "Give each entry an id of its own."
        )
    return entries


def _read_merges(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        halves = line.rstrip("\r").split(" ")
        if len(halves) != 2:
            raise ValueError(
                f"{path}:{number}: {line[:40]!r} is not two pieces with a space between. "
                "Give a merges.txt."
            )
        pairs.append((halves[0], halves[1]))
    return pairs
