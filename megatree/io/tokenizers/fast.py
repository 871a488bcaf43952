"""A tokenizer of the `tokenizers` library as one of ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers

from megatree.io.tokenizers.protocol import refuse_foreign_ids
from megatree.io.tokenizers.special import Special


@dataclass(frozen=True, kw_only=True, eq=False)
class FastTokenizer:
    """Wraps `backend`; see the protocol for the laws.

    Attributes:
        backend: owned by this object, whose construction changes its settings.
        special: the special ids.
        identity: digest of the vocabulary.
    """

    backend: tokenizers.Tokenizer
    special: Special
    identity: str

    def __post_init__(self) -> None:
        # Published files carry the settings of their first use: cut at 128 tokens, padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        other = tokenizers.Tokenizer.from_str(self.backend.to_str())
        other.encode_special_tokens = False
        return other

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in batch]

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are spelled out."""
        return self._marking.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        refuse_foreign_ids(ids, self.vocab_size)
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """Return the vocabulary's own spelling of one id."""
        refuse_foreign_ids([token], self.vocab_size)
        return self.backend.id_to_token(token) or ""
