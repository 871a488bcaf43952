"""Clipping by value moves what is out of bounds, and nothing else."""

import pytest
import torch

from megatree.runtime.optimizers import clip_value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", [False, True])
def test_elements_move_into_the_bounds(dtype: torch.dtype, tensor: bool) -> None:
    grads = {"g": torch.tensor([[-3.0, -0.5, 0.25], [float("inf"), float("nan"), 2.0]]).to(dtype)}
    clip_value(grads, torch.tensor(0.5) if tensor else 0.5)
    expected = torch.tensor([[-0.5, -0.5, 0.25], [0.5, float("nan"), 0.5]]).to(dtype)
    torch.testing.assert_close(grads["g"], expected, rtol=0, atol=0, equal_nan=True)


def test_a_bound_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no element is within 0\.0\. Give a positive bound"):
        clip_value({}, 0.0)
