"""Ops that give the same whatever the order of the elements of a dim that they need whole."""

ANY_ORDER = frozenset(
    [
        "softmax",
        "log_softmax",
        "logsumexp",
        "amax",
        "amin",
        "all",
        "any",
        "prod",
        "count_nonzero",
        "std",
        "var",
        "norm",
        "layer_norm",
        "rms_norm",
        "attention_blocks",
    ]
)
"""Names of ops that a dim in zigzag order may pass; others that need the dim whole refuse it."""
