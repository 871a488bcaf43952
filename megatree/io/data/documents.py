"""Token sequences in memory: a text small enough not to be preprocessed into files."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32, Int64, Integer, Shaped

from megatree.io.tokenizers.protocol import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Token ids of documents end to end; each is one sequence (see `Sequences`).

    Attributes:
        tokens: ids, the closing end-of-document token of each document included.
        lengths: tokens of each document.
        prefix: what a message calls them.
    """

    tokens: Integer[np.ndarray, " num_tokens"]
    lengths: Int32[np.ndarray, " num_documents"]
    prefix: str = "text in memory"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> Integer[np.ndarray, " length"]:
        start = int(self._ends[document]) - int(self.lengths[document])
        return self.tokens[start : int(self._ends[document])]

    @property
    def dtype(self) -> np.dtype:
        """Type of a token."""
        return self.tokens.dtype

    @property
    def documents(self) -> Int64[np.ndarray, " num_bounds"]:
        """Sequences before each document, then the number of sequences."""
        return np.arange(len(self) + 1)

    @cached_property
    def identity(self) -> str:
        """Digest of the content."""
        digest = hashlib.sha256(f"documents {len(self)} {self.dtype.str} ".encode())
        digest.update(np.ascontiguousarray(self.lengths).data)
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()

    def starts(self, sequences: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the place of the first token of each document."""
        return self._ends[sequences] - self.lengths[sequences]

    def take(self, places: Integer[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """Return the tokens at some places."""
        return self.tokens[places]

    def verify(self) -> None:
        """Nothing can change."""

    @cached_property
    def _ends(self) -> Int64[np.ndarray, " num_documents"]:
        return np.cumsum(self.lengths, dtype=np.int64)


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> Documents:
    """Encode each text, close it with the tokenizer's eod, and lay the documents end to end.

    Args:
        texts: one string per document; an empty one becomes a lone eod.
        tokenizer: its vocabulary sets the stored width: 2 bytes a token up to 65536 entries.

    Raises:
        ValueError: the tokenizer has no eod.
    """
    eod = tokenizer.special.need("eod")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    encoded = [np.array([*ids, eod], dtype) for ids in tokenizer.encode_batch(texts)]
    return Documents(
        tokens=np.concatenate([np.zeros(0, dtype), *encoded]),
        lengths=np.array([len(document) for document in encoded], np.int32),
    )
