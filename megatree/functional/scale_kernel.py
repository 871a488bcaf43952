"""A tensor times a factor that lies on the device, rounded once: a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""Elements that a program takes."""


@triton.jit
def _scale(x, factor, out, n, ELEMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(x + at, at < n, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), at < n)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x times a 0-d factor.

    Args:
        x: dense, no wider than float32.
        factor: 0-d, of any dtype.

    Returns:
        The dtype and shape of `x`.
    """
    out = torch.empty_like(x)
    _scale[(triton.cdiv(x.numel(), ELEMENTS),)](x, factor, out, x.numel(), ELEMENTS=ELEMENTS)
    return out
