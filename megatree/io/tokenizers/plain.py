"""Tokenizers without a file: bytes as ids, and text that is already ids."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatree.io.tokenizers.identity import digest
from megatree.io.tokenizers.marked import encode_marked
from megatree.io.tokenizers.protocol import refuse_foreign_ids
from megatree.io.tokenizers.special import Special

MARKS = {"<eod>": 256, "<bos>": 257, "<pad>": 258}


@dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """An id is a byte of UTF-8; then follow eod 256, bos 257, pad 258.

    >>> ByteTokenizer().encode("ab")
    [97, 98]
    """

    @property
    def vocab_size(self) -> int:
        """Bytes and special tokens."""
        return 256 + len(MARKS)

    @property
    def special(self) -> Special:
        """The special ids."""
        return Special(eod=256, eos=256, bos=257, pad=258)

    @property
    def identity(self) -> str:
        """Digest of the definition."""
        return digest("bytes", {"marks": MARKS}, self.special)

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [list(text.encode()) for text in texts]

    def encode_marked(self, text: str) -> list[int]:
        """Return the bytes of a text in which <eod>, <bos> and <pad> are spelled out."""
        return encode_marked(text, MARKS, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of bytes; those that are no UTF-8 become U+FFFD."""
        refuse_foreign_ids(ids, self.vocab_size)
        spelled = {token: spelling.encode() for spelling, token in MARKS.items()}
        parts = (spelled.get(token) or bytes([token]) for token in map(int, ids))
        return b"".join(parts).decode("utf-8", errors="replace")

    def piece(self, token: int) -> str:
        """Return one byte as text."""
        return self.decode([token])


@dataclass(frozen=True, kw_only=True)
class NullTokenizer:
    """The text is ids already: decimal numbers with white space between.

    The end of a document is given, never guessed: Megatron 0.12 wrote `vocab_size` for it, later
    versions `vocab_size - 1`, and the same command gave other files.

    Attributes:
        vocab_size: ids in all, `eod` included.
        eod: id that ends a document.

    >>> NullTokenizer(vocab_size=10, eod=9).encode("3 1")
    [3, 1]
    """

    vocab_size: int
    eod: int

    def __post_init__(self) -> None:
        if not 0 <= self.eod < self.vocab_size:
            raise ValueError(
                f"null tokenizer: eod {self.eod} is outside a vocabulary of {self.vocab_size}. "
                f"Use eod {self.vocab_size - 1} or vocab_size {self.eod + 1}."
            )

    @property
    def special(self) -> Special:
        """The special ids."""
        return Special(eod=self.eod)

    @property
    def identity(self) -> str:
        """Digest of the definition."""
        return digest("null", {"vocab_size": self.vocab_size}, self.special)

    def encode(self, text: str) -> list[int]:
        """Return the numbers that a text spells.

        Raises:
            ValueError: if a word is no number below the vocabulary size.
        """
        ids = []
        for word in text.split():
            # int() would also take "1_0", "+1" and digits of other scripts.
            token = int(word) if word.isascii() and word.isdigit() and len(word) < 20 else -1
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"null tokenizer: {word[:40]!r} is no id in 0..{self.vocab_size - 1}. "
                    "Write ids as decimal numbers, or raise vocab_size."
                )
            ids.append(token)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of each text."""
        return [self.encode(text) for text in texts]

    def encode_marked(self, text: str) -> list[int]:
        """Return the numbers that a text spells: nothing else is a mark here."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the ids as text."""
        refuse_foreign_ids(ids, self.vocab_size)
        return " ".join(str(int(token)) for token in ids)

    def piece(self, token: int) -> str:
        """Return one id as text."""
        return self.decode([token])
