"""Dropout by key and global index."""

import pytest
import torch

import megatree.functional as F
from tests.functional.check import rand
from tests.functional.halves import local_form, on_halves

KEY = torch.tensor(11)


def test_dropout_zeroes_a_rate_and_scales_the_rest() -> None:
    """Binomial: 100 000 draws of 0.3 have a standard deviation of 145."""
    x = rand(100, 1000).abs() + 1
    y = F.dropout(x, KEY, rate=0.3)
    dropped = y == 0
    assert abs(dropped.sum().item() - 30_000) < 5 * 145
    assert torch.equal(y[~dropped], (x * (1.0 / 0.7))[~dropped])


def test_gradient_has_the_mask_of_the_value() -> None:
    x = rand(20, 50).requires_grad_()
    y = F.dropout(x, KEY, rate=0.5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.where(y == 0, 0.0, 2.0).double())


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_halves_drop_what_the_whole_drops(dim: int) -> None:
    """A mask by local index is the same on both halves, and differs between meshes."""
    x = rand(4, 6, 8)
    results, _ = on_halves(
        str(dim),
        lambda comm: local_form(F.dropout)(comm, x.chunk(2, dim)[comm.rank], KEY, rate=0.4),
    )
    assert torch.equal(torch.cat(results, dim), F.dropout(x, KEY, rate=0.4))
    assert not torch.equal(results[0] == 0, results[1] == 0)


def test_mask_depends_on_the_key_only() -> None:
    x = torch.ones(4, 100)
    first = F.dropout(x, KEY, rate=0.5)
    assert torch.equal(first, F.dropout(x, 11, rate=0.5))
    assert torch.equal(first, F.dropout(x.double(), KEY, rate=0.5).float())
    assert not torch.equal(first, F.dropout(x, KEY + 1, rate=0.5))
    keys = [F.fold(KEY, layer, place) for layer in range(3) for place in ("a", "b")]
    assert len({int(key) for key in keys}) == 6


def test_rate_zero_is_the_identity() -> None:
    x = rand(3, 4)
    assert F.dropout(x, KEY, rate=0.0) is x


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_rate_outside_the_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"dropout: dropout rate is .* Give a rate in \[0, 1\)\."):
        F.dropout(rand(3), KEY, rate=rate)
