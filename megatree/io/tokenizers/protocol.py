"""What every tokenizer here does: text to ids, ids to text, and who it is."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from megatree.io.tokenizers.special import Special


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    Laws: every id that `encode` returns lies in 0..vocab_size - 1. `encode` reads its argument as
    plain text: the spelling of a special token inside a text never becomes its id. Two tokenizers
    of one `identity` give the same ids for every text and the same special ids.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included; never padded."""
        ...

    @property
    def special(self) -> Special:
        """The special ids by name."""
        ...

    @property
    def identity(self) -> str:
        """Digest of all that decides the ids; stored beside data and in checkpoints."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; none is added at its ends."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `[encode(text) for text in texts]`."""
        ...

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are spelled out (a chat template)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens appear as they are spelled."""
        ...

    def piece(self, token: int) -> str:
        """Return the vocabulary's own spelling of one id ('##ing' of WordPiece)."""
        ...


def refuse_foreign_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raise if an id is outside the vocabulary: libraries drop such ids, or crash on them.

    Raises:
        ValueError: naming the first id outside.
    """
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"decode: id {token} at position {position} is outside the vocabulary of "
                f"{vocab_size} entries. Use the tokenizer that made the ids."
            )
