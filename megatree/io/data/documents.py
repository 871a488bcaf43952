"""Documents as one token stream: where each starts, and an end-of-document token after each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Token ids of documents end to end; document i is `tokens[starts[i]:starts[i + 1]]`.

    Attributes:
        tokens: ids, the closing end-of-document token of each document included.
        starts: first position of each document, then the length of the stream.
    """

    tokens: Integer[np.ndarray, " num_tokens"]
    starts: Integer[np.ndarray, " num_starts"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, document: int) -> Integer[np.ndarray, " length"]:
        return self.tokens[self.starts[document] : self.starts[document + 1]]

    def select(self, chosen: Sequence[int]) -> "Documents":
        """Return the `chosen` documents, in that order, as a stream of their own."""
        return _join([self[document] for document in chosen], self.tokens.dtype)


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer, *, eod: int) -> Documents:
    """Encode each text, close it with `eod`, and lay the documents end to end.

    Args:
        texts: one string per document; an empty one becomes a lone `eod`.
        tokenizer: its vocabulary sets the stored width: 2 bytes a token up to 65536 entries.
        eod: id of the end-of-document token.

    Raises:
        ValueError: if `eod` is no id of the tokenizer.
    """
    vocab = tokenizer.get_vocab_size()
    if not 0 <= eod < vocab:
        raise ValueError(
            f"encode_documents: eod {eod} is not an id of a tokenizer of {vocab} entries. "
            f"Use one in 0..{vocab - 1}."
        )
    dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.int32)
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return _join([np.array([*one.ids, eod], dtype) for one in encoded], dtype)


def _join(documents: Sequence[np.ndarray], dtype: np.dtype) -> Documents:
    starts = np.cumsum([0, *(len(document) for document in documents)])
    tokens = np.concatenate([np.zeros(0, dtype), *documents])
    return Documents(tokens=tokens, starts=starts)
