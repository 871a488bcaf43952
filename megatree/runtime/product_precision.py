"""How torch computes products, said by a run instead of left to what the process did before."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

Products = Literal["highest", "high"]
"""Of float32 products: "highest" keeps 24 bits of every factor, "high" lets a GPU use TF32, 11 bits
(sums stay float32)."""


@contextmanager
def product_precision(
    products: Products = "highest", *, narrow_sums: bool = True
) -> Generator[None]:
    """Compute what follows so; on leaving all is as before.

    It sets torch's process-wide switches, which kernels read when they are launched and
    torch.compile when it compiles, so a run is inside from its first step to its last.

    Args:
        products: of float32 tensors.
        narrow_sums: whether cuBLAS may add parts of a bfloat16 or float16 product in that dtype
            where it splits a long sum; sums within a part are float32 in any case.
    """
    matmul = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set by one of torch's newer switches alone, which the older one cannot express.
        before = None
    newer = matmul.fp32_precision
    sums = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    accumulates = matmul.allow_fp16_accumulation
    try:
        torch.set_float32_matmul_precision(products)
        matmul.allow_bf16_reduced_precision_reduction = narrow_sums
        matmul.allow_fp16_reduced_precision_reduction = narrow_sums
        matmul.allow_fp16_accumulation = False  # float16 sums of a whole product are never meant
        yield
    finally:
        if before is None:
            matmul.fp32_precision = newer
        else:
            torch.set_float32_matmul_precision(before)
        (
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        ) = sums
        matmul.allow_fp16_accumulation = accumulates
