"""Made-up sequences of random lengths that count upwards: data without a file, for speed tests."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32, Int64, Integer


@dataclass(frozen=True, kw_only=True, eq=False)
class MockSequences:
    """Sequences 1, 2, 3, ... (modulo the vocabulary) that end with `eod`; Megatron's mock data.

    Attributes:
        vocab_size: ids are below it.
        eod: last token of each sequence.
        count: sequences.
        longest: no sequence has as many tokens.
    """

    vocab_size: int
    eod: int
    count: int = 100_000
    longest: int = 4096
    prefix: str = "mock data"
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.int64))
    lengths: Int32[np.ndarray, " num_sequences"] = field(init=False, repr=False)
    documents: Int64[np.ndarray, " num_bounds"] = field(init=False, repr=False)
    _ends: Int64[np.ndarray, " num_sequences"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eod < self.vocab_size:
            raise ValueError(
                f"MockSequences: eod {self.eod} is no id below {self.vocab_size}. Use one."
            )
        lengths = np.random.default_rng(0).integers(1, self.longest, self.count, np.int32)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "documents", np.arange(self.count + 1, dtype=np.int64))
        object.__setattr__(self, "_ends", np.cumsum(lengths, dtype=np.int64))

    @property
    def identity(self) -> str:
        """Digest of the parameters."""
        told = f"mock {self.vocab_size} {self.eod} {self.count} {self.longest}"
        return hashlib.sha256(told.encode()).hexdigest()

    def starts(self, sequences: Integer[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the place of the first token of each sequence."""
        return self._ends[sequences] - self.lengths[sequences]

    def take(self, places: Integer[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Return the tokens at some places."""
        sequence = np.searchsorted(self._ends, places, side="right")
        left = self._ends[sequence] - places
        tokens = (self.lengths[sequence] - left + 1) % self.vocab_size
        return np.where(left == 1, self.eod, tokens)

    def verify(self) -> None:
        """Nothing can change."""
