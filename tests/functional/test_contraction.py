"""Contractions against torch.einsum and plain loops."""

import pytest
import torch

import megatree.functional as F
from megatree.functional.contraction import _contraction
from tests.functional.check import assert_same, rand

SIZES = {"b": 2, "t": 3, "s": 5, "d": 4, "g": 2, "r": 3, "k": 4, "f": 6, "v": 7, "e": 2, "c": 3}
TEXTS = [
    "b t g r k, g r k d -> b t d",  # one matrix product over three labels
    "b t f, f d -> b t d",
    "t d, d v -> t v",
    "t k, k -> t",
    "b t d, v d -> b t v",
    "b t g r k, b s g k -> b g r t s",
    "b g r t s, b s g k -> b t g r k",
    "b t d, e d f -> e b t f",
    "b t f, f d -> t b d",
    "b t f, b f d -> b t d",
    "b t, b t, t -> b",
    "b t d -> d",
    "t d -> d t",
    "t, d -> t d",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_einsum_equals_torch(text: str, dtype: torch.dtype) -> None:
    parts = text.partition("->")[0].split(",")
    operands = [
        rand(*(SIZES[x] for x in p.split()), dtype=dtype, seed=i) for i, p in enumerate(parts)
    ]
    assert_same(
        lambda *xs: F.einsum(text, *xs),
        lambda *xs: torch.einsum(text.replace(" ", ""), *xs),
        *operands,
    )


def test_einsum_signature_sums_what_vanishes() -> None:
    """A label that were free in a signature but summed by the op would drop a reduction."""
    rule = getattr(_contraction("b t g k, g k d -> b t d"), "rule")  # noqa: B009
    assert (rule.signature, rule.linear) == ("b t g+ k+, g+ k+ d -> b t d", ((0,), (1,)))


def test_einsum_takes_leading_dims_by_dots() -> None:
    x, w = rand(2, 3, 4), rand(5, 4)
    assert torch.equal(F.einsum("... d, v d -> ... v", x, w), torch.einsum("...d,vd->...v", x, w))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "batch d, d -> batch",
            r"einsum: 'batch' is no label in 'batch d, d -> batch'\. Write single",
        ),
        ("b d, d", r"einsum: there is no '->' in 'b d, d'\. Write single letters"),
    ],
)
def test_einsum_refuses_a_text_it_cannot_read(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        F.einsum(text, rand(2, 3), rand(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_linear_contracts_the_last_dims(
    batch: tuple[int, ...], lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, w = rand(*batch, 6, dtype=dtype), rand(*lead, 6, dtype=dtype, seed=1)
    assert_same(F.linear, lambda x, w: torch.tensordot(x, w, ([-1], [-1])), x, w)


def test_project_is_linear_for_every_weight() -> None:
    x, weights = rand(2, 3, 4), (rand(2, 3, 4), rand(5, 4), rand(4, seed=3))
    assert_same(
        lambda x, *ws: F.project(x, ws),
        lambda x, *ws: tuple(torch.tensordot(x, w, ([-1], [-1])) for w in ws),
        x,
        *weights,
    )
