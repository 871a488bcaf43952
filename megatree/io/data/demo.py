"""The text and tokenizer that ship inside the package, so that a demo needs no download."""

import json
import lzma
from dataclasses import dataclass
from importlib import resources

from tokenizers import Tokenizer

from megatree.io.data.bpe import EOD


@dataclass(frozen=True, kw_only=True, eq=False)
class Demo:
    """Six novels by Jane Austen as chapters, and a 512-entry byte-level BPE trained on them.

    Attributes:
        texts: one string per chapter, in the order of the file.
        titles: novel and chapter of each text.
        tokenizer: covers any text; the end-of-document marker is its entry `eod`.
    """

    texts: tuple[str, ...]
    titles: tuple[str, ...]
    tokenizer: Tokenizer

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""
        token = self.tokenizer.token_to_id(EOD)
        assert token is not None, f"the shipped tokenizer lacks {EOD}"
        return token


def load_demo() -> Demo:
    """Read the shipped text and tokenizer."""
    folder = resources.files("megatree") / "demo_data"
    lines = lzma.decompress((folder / "austen.jsonl.xz").read_bytes()).decode().splitlines()
    chapters = [json.loads(line) for line in lines]
    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # The marker's spelling inside a text is text, not the end of a document.
    tokenizer.encode_special_tokens = True
    return Demo(
        texts=tuple(chapter["text"] for chapter in chapters),
        titles=tuple(chapter["title"] for chapter in chapters),
        tokenizer=tokenizer,
    )
