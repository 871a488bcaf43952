"""Activations against Hugging Face's."""

from collections.abc import Callable

import pytest
import torch
from transformers.activations import ACT2FN

import megatree.functional as F
from tests.functional.check import assert_same, rand

PAIRS = [(F.silu, "silu"), (F.gelu, "gelu"), (F.gelu_tanh, "gelu_new"), (F.squared_relu, "relu2")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("fn", "name"), PAIRS)
def test_activation_equals_hugging_face(fn: Callable, name: str, dtype: torch.dtype) -> None:
    assert_same(fn, ACT2FN[name], 3 * rand(4, 50, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swiglu_gates_with_silu(dtype: torch.dtype) -> None:
    gate, up = rand(4, 50, dtype=dtype), rand(4, 50, dtype=dtype, seed=1)
    assert_same(F.swiglu, lambda g, u: g / (1 + torch.exp(-g)) * u, gate, up)
