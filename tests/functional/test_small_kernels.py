"""Triton kernels that copy, scale and add, in Triton's interpreter, against torch."""

import importlib
from types import ModuleType

import pytest
import torch

from megatree.functional.linear_loss import _scaled
from tests.functional.check import rand
from tests.tolerances import distance


def kernels(name: str) -> ModuleType:
    pytest.importorskip("triton", reason="needs Triton's interpreter")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the kernels themselves")
    return importlib.import_module(f"megatree.functional.{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_and_their_sums(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Rows and columns that fill no tile, and several programs below each other."""
    module = kernels("beside_kernel")
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(module, "COLUMNS", 16)
    monkeypatch.setattr(module, "TIMES", 2)
    parts = [rand(3, 7, width, seed=width).to(dtype) for width in (20, 5, 33)]
    whole, sums = module.side_by_side_and_sums(parts)
    assert torch.equal(whole, torch.cat(parts, -1))
    assert sums.dtype == torch.float32
    assert distance(sums, whole.double().sum((0, 1))) < 1e-6


def test_a_factor_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts results to bfloat16 where a GPU rounds them: less than 2^-7 apart."""
    module = kernels("scale_kernel")
    monkeypatch.setattr(module, "ELEMENTS", 16)
    x, factor = rand(5, 7), torch.tensor(1 / 3)
    assert torch.equal(module.scaled(x.float(), factor), x.float() * factor)
    narrow = x.bfloat16()
    found = module.scaled(narrow, factor.double())
    assert found.dtype == torch.bfloat16
    assert ((found.double() - narrow.double() / 3).abs() <= 2**-7 * narrow.double().abs() / 3).all()


def test_the_loss_scales_its_gradients_by_the_whole_factor() -> None:
    """bfloat16 has 1/3 as 0.33398: every gradient would be off by 2e-3."""
    x = torch.full((4, 8), 3.0, dtype=torch.bfloat16)
    assert torch.equal(_scaled(x, torch.tensor(1 / 3, dtype=torch.float64)), torch.ones_like(x))
