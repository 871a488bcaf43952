"""A leaf's rule is that of the first pattern that matches its path, and idle patterns show."""

import pytest

from megatree.runtime.optimizers import LeafRule, by_path

RULES = by_path(
    {
        "embed.*": LeafRule(lr=0.1),
        "blocks.*.wq": LeafRule(lr=3.0, matrix=True),
        "blocks.*.w?": LeafRule(matrix=True),
    }
)


@pytest.mark.parametrize(
    ("path", "num_dims", "rule"),
    [
        ("embed.table", 2, LeafRule(lr=0.1)),
        ("blocks.dense.wq", 4, LeafRule(lr=3.0, matrix=True)),
        ("blocks.dense.wk", 3, LeafRule(matrix=True)),
        ("blocks.dense.w_up", 2, LeafRule()),
        ("blocks.dense.norm1.scale", 1, LeafRule(decay=0.0)),
        ("head.bias", 1, LeafRule(decay=0.0)),
        ("blocks.dense.WQ", 2, LeafRule()),
    ],
)
def test_the_first_pattern_decides(path: str, num_dims: int, rule: LeafRule) -> None:
    assert RULES(path, num_dims) == rule


def test_a_pattern_that_matches_no_leaf_is_refused() -> None:
    RULES.check(["embed.table", "blocks.dense.wq", "blocks.dense.wk"])
    with pytest.raises(
        ValueError, match=r"2 of 3 patterns match none of 2 leaves: 'blocks\.\*\.wq', 'blocks"
    ):
        RULES.check(["embed.table", "head.norm"])
