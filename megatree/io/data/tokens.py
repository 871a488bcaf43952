"""Samples of a token stream in an order that depends on the seed and the consumed count only."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer, Shaped

from megatree.io.data.order import sample_ids


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDataset:
    """Cuts a token stream into samples of `seq` predictions and deals them out without end.

    Sample i reads `tokens[i * seq : (i + 1) * seq + 1]`, so each token but the first is a label
    of exactly one sample, up to a tail shorter than `seq`. Each epoch deals every sample once.
    The state of a run is the number of consumed samples: neither the batch size nor the number of
    ranks shows in the order.

    Attributes:
        tokens: the stream.
        seq: tokens in a row of a batch.
        seed: picks the order.
    """

    tokens: Integer[np.ndarray, " num_tokens"]
    seq: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq < 1:
            raise ValueError(f"TokenDataset: seq {self.seq} predicts nothing. Use at least 1.")
        if len(self) < 1:
            raise ValueError(
                f"TokenDataset: {len(self.tokens)} tokens hold no sample of {self.seq} + 1. "
                f"Add tokens, or lower seq to {len(self.tokens) - 1}."
            )

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return (len(self.tokens) - 1) // self.seq

    @property
    def identity(self) -> str:
        """Digest of all that decides the samples and their order; equal on all ranks of a run."""
        digest = hashlib.sha256(f"{self.seq} {self.seed} {self.tokens.dtype.str} ".encode())
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()

    def batch(
        self, consumed: int, num_samples: int, *, rows: tuple[int, int] | None = None
    ) -> dict[str, Shaped[np.ndarray, "b t"]]:
        """Return the `num_samples` samples that follow the first `consumed` ones, or some rows.

        `batch(c, n, rows=(lo, hi))` equals rows lo to hi of `batch(c, n)` and reads no others.
        Any cut of a range of consumed samples into batches deals the same samples in that order.

        Args:
            consumed: samples dealt before this batch, over all epochs.
            num_samples: rows of the global batch (of a step, or of one microbatch).
            rows: (lo, hi) to read only these rows; all by default.

        Returns:
            `tokens` and `labels` (int64 ids; labels are the tokens one later) and `weights`
            (float32, what each label counts in the loss: 1).

        Raises:
            ValueError: if a count is negative, or the rows are not inside the batch.
        """
        lo, hi = (0, num_samples) if rows is None else rows
        if consumed < 0 or num_samples < 0:
            raise ValueError(
                f"batch: consumed {consumed} and num_samples {num_samples} must not be negative. "
                "Count from 0."
            )
        if not 0 <= lo <= hi <= num_samples:
            raise ValueError(
                f"batch: rows ({lo}, {hi}) are not inside a batch of {num_samples} samples. "
                f"Use 0 <= lo <= hi <= {num_samples}."
            )
        ids = sample_ids(consumed + np.arange(lo, hi), len(self), seed=self.seed)
        window = ids[:, None] * self.seq + np.arange(self.seq + 1)
        read = self.tokens[window].astype(np.int64)
        return {
            "tokens": np.ascontiguousarray(read[:, :-1]),
            "labels": np.ascontiguousarray(read[:, 1:]),
            "weights": np.ones((hi - lo, self.seq), np.float32),
        }
