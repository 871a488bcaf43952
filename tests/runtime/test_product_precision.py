"""How products are computed is what the run says, whatever the process said before and after."""

from collections.abc import Generator
from typing import Any

import pytest
import torch

from megatree.runtime.product_precision import Products, product_precision


def settings() -> tuple[Any, ...]:
    matmul = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
    )


@pytest.fixture
def _as_found() -> Generator[None]:
    matmul, before = torch.backends.cuda.matmul, settings()
    yield
    torch.set_float32_matmul_precision(before[0])
    matmul.allow_bf16_reduced_precision_reduction = before[1]
    matmul.allow_fp16_reduced_precision_reduction = before[2]
    matmul.allow_fp16_accumulation = before[3]


@pytest.mark.usefixtures("_as_found")
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("products", ["highest", "high"])
@pytest.mark.parametrize("ambient", ["highest", "medium"])
def test_settings_are_applied_and_given_back(
    products: Products, narrow: bool, ambient: str
) -> None:
    torch.set_float32_matmul_precision(ambient)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    before = settings()
    with product_precision(products, narrow_sums=narrow):
        assert settings() == (products, narrow, narrow, False)
    assert settings() == before
    with pytest.raises(KeyError), product_precision(products, narrow_sums=narrow):
        raise KeyError
    assert settings() == before


@pytest.mark.usefixtures("_as_found")
def test_a_newer_switch_that_was_set_alone_is_given_back() -> None:
    """torch then cannot say in the older way how products are computed, and raises when asked."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with product_precision("highest"):
            assert (torch.get_float32_matmul_precision(), matmul.fp32_precision) == (
                "highest",
                "ieee",
            )
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
