"""Entropy of single tokens: the loss of the best model that ignores all context."""

import numpy as np
from jaxtyping import Integer


def unigram_entropy(tokens: Integer[np.ndarray, " n"]) -> float:
    """Return the entropy of the tokens' frequencies in nats per token.

    Args:
        tokens: ids, at least one, none negative.

    Raises:
        ValueError: if there are no tokens.

    >>> round(unigram_entropy(np.array([0, 1, 2, 3])), 4)  # log 4
    1.3863
    """
    if not tokens.size:
        raise ValueError("unigram_entropy: 0 tokens have no frequencies. Pass at least one.")
    counts = np.bincount(tokens)
    share = counts[counts > 0] / tokens.size
    return float(-(share * np.log(share)).sum())
