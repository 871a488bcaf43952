"""Embedding, whole and on the two halves of a table."""

import pytest
import torch

import megatree.functional as F
from tests.functional.check import assert_same, rand
from tests.functional.halves import Half, local_form, on_halves

IDS = torch.tensor([[0, 3, 3], [7, 4, 1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_embedding_picks_rows(dtype: torch.dtype) -> None:
    assert_same(lambda t: F.embedding(IDS, t), lambda t: t[IDS], rand(8, 4, dtype=dtype))


def test_halves_of_a_table_sum_to_the_whole() -> None:
    """A row found on both halves, or on none, doubles or loses an embedding."""
    table = rand(8, 4)

    def half(comm: Half) -> tuple[torch.Tensor, torch.Tensor]:
        own = table.chunk(2)[comm.rank].clone().requires_grad_()
        out = local_form(F.embedding)(comm, IDS, own)
        (grad,) = torch.autograd.grad((out * rand(2, 3, 4, seed=5)).sum(), own)
        return out.detach(), grad

    results, collectives = on_halves("v", half)
    whole = table.clone().requires_grad_()
    out = F.embedding(IDS, whole)
    (grad,) = torch.autograd.grad((out * rand(2, 3, 4, seed=5)).sum(), whole)
    assert torch.equal(results[0][0] + results[1][0], out)
    assert torch.equal(torch.cat([results[0][1], results[1][1]]), grad)
    assert collectives == 0


def test_an_id_outside_the_table_is_an_error() -> None:
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([8]), rand(8, 4))
