"""The text and tokenizer that ship inside the package, so that a demo needs no download."""

import json
import lzma
from dataclasses import dataclass
from importlib import resources

from megatree.io.data.bpe import EOD
from megatree.io.tokenizers.fast import FastTokenizer
from megatree.io.tokenizers.hf import load_tokenizer_json


@dataclass(frozen=True, kw_only=True, eq=False)
class Demo:
    """Six novels by Jane Austen as chapters, and a 512-entry byte-level BPE trained on them.

    Attributes:
        texts: one string per chapter, in the order of the file.
        titles: novel and chapter of each text.
        tokenizer: covers any text; ends a document with its entry <|endoftext|>.
    """

    texts: tuple[str, ...]
    titles: tuple[str, ...]
    tokenizer: FastTokenizer


def load_demo() -> Demo:
    """Read the shipped text and tokenizer."""
    raw = (resources.files("megatree") / "demo_data" / "austen.jsonl.xz").read_bytes()
    chapters = [json.loads(line) for line in lzma.decompress(raw).decode().splitlines()]
    return Demo(
        texts=tuple(chapter["text"] for chapter in chapters),
        titles=tuple(chapter["title"] for chapter in chapters),
        tokenizer=load_demo_tokenizer(),
    )


def load_demo_tokenizer() -> FastTokenizer:
    """Read the shipped tokenizer."""
    with resources.as_file(resources.files("megatree") / "demo_data" / "tokenizer.json") as path:
        return load_tokenizer_json(path, roles={"eod": EOD})
