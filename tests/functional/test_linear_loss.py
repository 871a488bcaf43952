"""The fused linear and cross-entropy against the two ops: values, gradients, chunks, memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megatree.functional as F
from tests.functional.check import rand
from tests.functional.halves import Half, local_form, on_halves
from tests.tolerances import RELATIVE, distance

LABELS = torch.tensor([[0, 6, -100], [3, 4, 5]])
WEIGHTS = torch.tensor([[1.0, 0.5, 2.0], [0.0, 1.0, 0.25]])


def operands(columns: int = 10, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    x, table = rand(2, 3, 4, dtype=torch.float64), rand(columns, 4, seed=1, dtype=torch.float64)
    weights = WEIGHTS.to(torch.promote_types(dtype, torch.float32))
    return x.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), weights.requires_grad_()


def differentiate(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A cotangent that is not 1: the backward scales what the forward has formed.
    return (loss.detach(), *torch.autograd.grad(0.3 * loss, leaves))


def reference(leaves: tuple[Tensor, ...], num_classes: int = 7) -> tuple[Tensor, ...]:
    x, table, weights = leaves
    nll = F.cross_entropy(F.linear(x, table), LABELS, num_classes=num_classes)
    return differentiate((nll * weights).sum(), leaves)


def fused(leaves: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    x, table, weights = leaves
    loss = F.linear_cross_entropy(x, table, LABELS, weights, num_classes=7, **options)
    return differentiate(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("columns", [7, 10])
@pytest.mark.parametrize("chunk", [1, 4, 6, None])
def test_it_equals_the_two_ops(chunk: int | None, columns: int, dtype: torch.dtype) -> None:
    leaves = operands(columns, dtype)
    for mine, theirs in zip(fused(leaves, chunk=chunk), reference(leaves), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert distance(mine, theirs) < RELATIVE[dtype]


@pytest.mark.parametrize("chunk", [1, 6])
def test_narrow_operands_are_as_near_to_float64_as_the_two_ops_are(chunk: int) -> None:
    """Gradients of the table add up in float32, however many chunks there are."""
    leaves = operands(dtype=torch.bfloat16)
    exact = reference(tuple(z.detach().double().requires_grad_() for z in leaves))
    found = zip(fused(leaves, chunk=chunk), reference(leaves), exact, strict=True)
    for mine, theirs, true in found:
        assert mine.dtype == theirs.dtype
        assert distance(mine, true) < 1.5 * distance(theirs, true) + 2**-9


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1)])
def test_only_the_gradients_that_are_asked_for_are_formed(wanted: tuple[int, ...]) -> None:
    leaves = operands()
    expected = reference(leaves)[1:]
    inputs = [z if i in wanted else z.detach() for i, z in enumerate(leaves)]
    loss = F.linear_cross_entropy(inputs[0], inputs[1], LABELS, inputs[2], num_classes=7, chunk=4)
    grads = torch.autograd.grad(0.3 * loss, [leaves[i] for i in wanted])
    for i, mine in zip(wanted, grads, strict=True):
        assert distance(mine, expected[i]) < RELATIVE[torch.float64]


@pytest.mark.parametrize("chunk", [2, 6])
def test_halves_of_the_table_give_the_whole_loss(chunk: int) -> None:
    """Gradients of what the halves share are terms of a sum; padding fills most of the second."""
    leaves = operands(12)
    expected = reference(leaves)

    def half(comm: Half) -> tuple[Tensor, ...]:
        x, table, weights = (z.detach().clone() for z in leaves)
        mine = tuple(z.requires_grad_() for z in (x, table.chunk(2)[comm.rank].clone(), weights))
        form = local_form(F.linear_cross_entropy)
        loss = form(comm, mine[0], mine[1], LABELS, mine[2], num_classes=7, chunk=chunk)
        return differentiate(loss, mine)

    (first, second), collectives = on_halves("v", half)
    assert torch.equal(first[0], second[0])
    whole = (first[0], first[1] + second[1], torch.cat([first[2], second[2]]), first[3] + second[3])
    for mine, theirs in zip(whole, expected, strict=True):
        assert distance(mine, theirs) < RELATIVE[torch.float64]
    assert collectives == 2 * math.ceil(6 / chunk), "a maximum and a sum a chunk, nothing backward"


def test_padding_and_ignored_positions_have_no_gradient() -> None:
    x, table, weights = operands()
    with torch.no_grad():
        table[7:] *= 100  # would take all probability
    _, dx, dtable, dweights = fused((x, table, weights), chunk=2)
    assert dtable[7:].count_nonzero() == 0
    assert dx[0, 2].count_nonzero() == 0
    assert dweights[0, 2] == 0
    assert dx[0, 0].count_nonzero() == 4


class _Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_logits_never_exist_as_a_whole() -> None:
    x, table = rand(64, 4).requires_grad_(), rand(96, 4).requires_grad_()
    labels, weights = torch.zeros(64, dtype=torch.int64), torch.ones(64)
    with _Largest() as seen:
        F.linear_cross_entropy(x, table, labels, weights, chunk=8).backward()
    assert seen.most == 8 * 96
    with _Largest() as seen:
        (F.cross_entropy(F.linear(x, table), labels) * weights).sum().backward()
    assert seen.most == 64 * 96


def test_no_gradient_is_formed_without_autograd() -> None:
    x, table, weights = operands()
    with torch.no_grad(), _Largest():
        loss = F.linear_cross_entropy(x, table, LABELS, weights, num_classes=7)
    assert not loss.requires_grad
    assert distance(loss, reference((x, table, weights))[0]) < RELATIVE[torch.float64]


def test_what_cannot_be_is_refused() -> None:
    x, table, weights = operands()
    with pytest.raises(RuntimeError, match="out of bounds"):
        F.linear_cross_entropy(x, table, torch.full((2, 3), 7), weights, num_classes=7)
    with pytest.raises(ValueError, match=r"num_classes is 11, the table has 10 rows\. Give at"):
        F.linear_cross_entropy(x, table, LABELS, weights, num_classes=11)
    with pytest.raises(ValueError, match=r"chunk is 0\. Give at least 1, or None\."):
        F.linear_cross_entropy(x, table, LABELS, weights, chunk=0)
