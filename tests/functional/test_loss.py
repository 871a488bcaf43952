"""Cross-entropy against torch, with padding, ignored labels and a cut vocabulary."""

from typing import Any

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from tests.functional.check import assert_same, rand
from tests.functional.halves import Half, local_form, on_halves
from tests.tolerances import RELATIVE, distance

LABELS = torch.tensor([[0, 6, -100], [3, 4, 5]])


def oracle(logits: Tensor) -> Tensor:
    flat = torch.nn.functional.cross_entropy(
        logits[..., :7].flatten(0, 1), LABELS.flatten(), reduction="none", ignore_index=-100
    )
    return flat.unflatten(0, LABELS.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [7, 10])
def test_cross_entropy_equals_torch(columns: int, dtype: torch.dtype) -> None:
    assert_same(
        lambda x: F.cross_entropy(x, LABELS, num_classes=7),
        oracle,
        3 * rand(2, 3, columns, dtype=dtype),
    )


def run(logits: Tensor, fn: Any) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    out = fn(logits)
    (grad,) = torch.autograd.grad((out * rand(2, 3, seed=5).to(out.dtype)).sum(), logits)
    return out.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_classes", [7, 5, 8, None])
def test_halves_of_the_vocabulary_give_the_whole_loss(
    num_classes: int | None, dtype: torch.dtype
) -> None:
    """Padding may start in either half, or fill one of them."""
    logits = 3 * rand(2, 3, 10 if num_classes != 5 else 12, dtype=dtype)
    labels = LABELS if num_classes != 5 else LABELS.clamp_max(4)

    def half(comm: Half) -> tuple[Tensor, Tensor]:
        own = logits.chunk(2, -1)[comm.rank]
        fn = local_form(F.cross_entropy)
        return run(own, lambda x: fn(comm, x, labels, num_classes=num_classes))

    results, collectives = on_halves("v", half)
    out, grad = run(logits, lambda x: F.cross_entropy(x, labels, num_classes=num_classes))
    assert torch.equal(results[0][0], results[1][0])
    assert distance(results[0][0], out) < RELATIVE[dtype]
    assert distance(torch.cat([r[1] for r in results], -1), grad) < RELATIVE[dtype]
    assert collectives == 2, "a maximum and a sum forward, nothing backward"


def test_padding_takes_no_probability_and_no_gradient() -> None:
    logits = rand(2, 3, 10)
    logits[..., 7:] = 50.0  # would take all probability
    out, grad = run(logits, lambda x: F.cross_entropy(x, LABELS, num_classes=7))
    assert out.max() < 10
    assert grad[..., 7:].count_nonzero() == 0
    assert grad[..., :7].count_nonzero() == 5 * 7


@pytest.mark.parametrize("cut", [False, True])
def test_ignored_labels_have_no_loss_and_no_gradient(cut: bool) -> None:
    logits = rand(2, 3, 8)

    def half(comm: Half) -> tuple[Tensor, Tensor]:
        fn = local_form(F.cross_entropy)
        return run(logits.chunk(2, -1)[comm.rank], lambda x: fn(comm, x, LABELS))

    results = (
        on_halves("v", half)[0] if cut else [run(logits, lambda x: F.cross_entropy(x, LABELS))]
    )
    for out, grad in results:
        assert out[0, 2] == 0
        assert grad[0, 2].count_nonzero() == 0
        assert grad[0, 1].count_nonzero() == grad.shape[-1]


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = rand(2, 3, 5000).to(torch.bfloat16)
    out, grad = run(logits, lambda x: F.cross_entropy(x, LABELS))
    expected, _ = run(logits.double(), lambda x: F.cross_entropy(x, LABELS))
    assert (out.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    assert distance(out, expected) < RELATIVE[torch.float32]


def test_a_label_beyond_the_classes_is_an_error() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        F.cross_entropy(rand(2, 3, 10), torch.full((2, 3), 7), num_classes=7)
    with pytest.raises(
        ValueError, match=r"num_classes is 11, the logits have 10 columns\. Give at"
    ):
        F.cross_entropy(rand(2, 3, 10), LABELS, num_classes=11)
