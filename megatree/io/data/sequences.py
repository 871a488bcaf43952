"""What a dataset needs of its token sequences, wherever they come from."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, Integer, Shaped


@runtime_checkable
class Sequences(Protocol):
    """Numbered token sequences, and flat places that name a token each."""

    @property
    def prefix(self) -> str:
        """What a message calls them."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Type of a token."""
        ...

    @property
    def lengths(self) -> Int32[np.ndarray, " num_sequences"]:
        """Tokens of each sequence."""
        ...

    @property
    def documents(self) -> Int64[np.ndarray, " num_bounds"]:
        """Sequences before each document, then the number of sequences."""
        ...

    @property
    def identity(self) -> str:
        """Digest of the content."""
        ...

    def starts(self, sequences: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the place of the first token of each sequence; the others follow it."""
        ...

    def take(self, places: Integer[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
        """Return the tokens at some places."""
        ...

    def verify(self) -> None:
        """Raise a ValueError if the content is no longer what it was."""
        ...


def read_sequences(source: Sequences, first: int, end: int) -> list[Shaped[np.ndarray, " _"]]:
    """Return the tokens of sequences `first` to `end`."""
    starts = source.starts(np.arange(first, end))
    lengths = source.lengths[first:end].tolist()
    return [
        source.take(np.arange(start, start + length))
        for start, length in zip(starts.tolist(), lengths, strict=True)
    ]
