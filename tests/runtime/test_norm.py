"""The global norm is the norm, whatever the size of the buffers and however they are cut."""

import pytest
import torch

from megatree.runtime.norm import _norm


def test_millions_of_elements_lose_nothing() -> None:
    """Added one after another in float32 they lose 3e-4."""
    x = torch.randn(3_300_001, generator=torch.Generator().manual_seed(0))
    assert _norm(x).item() == pytest.approx(x.double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("shape", [(3, 10), (2, 4096), (2, 4097), (0, 5), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_shape_has_a_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert _norm(x).item() == pytest.approx(x.double().norm().item(), rel=1e-6)
