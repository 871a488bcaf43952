"""AdamW over a buffer as one Triton kernel: every number is read once and written once."""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""Elements of a program."""


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    param, grad, m, v, copy, scale, found_inf, n, lr, beta1, beta2, eps, kept, fix1, fix2,
    HAS_COPY: tl.constexpr, HAS_FLAG: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Update `ELEMENTS` elements; nothing is written if the flag is set."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    if HAS_FLAG:
        n = tl.where(tl.load(found_inf) == 0.0, n, 0)
    inside = at < n
    g = tl.load(grad + at, inside, other=0.0).to(tl.float32) * tl.load(scale)
    p = tl.load(param + at, inside, other=0.0)
    first = tl.load(m + at, inside, other=0.0).to(tl.float32)
    second = tl.load(v + at, inside, other=0.0).to(tl.float32)
    first = beta1 * first + (1.0 - beta1) * g
    second = beta2 * second + (1.0 - beta2) * g * g
    p = p * kept - lr * (first * fix1) / (tl.sqrt(second * fix2) + eps)
    tl.store(m + at, first.to(m.dtype.element_ty), inside)
    tl.store(v + at, second.to(v.dtype.element_ty), inside)
    tl.store(param + at, p, inside)
    if HAS_COPY:
        tl.store(copy + at, p.to(copy.dtype.element_ty), inside)


def adamw_in_place(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    copy: Tensor | None,
    scale: Tensor,
    found_inf: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    count: int,
) -> None:
    """Make one update of dense buffers of equal length.

    Args:
        param: float32.
        grad: of any float dtype; it is not changed.
        m, v: moments, of any float dtype.
        copy: written too, in its dtype; None for no copy.
        scale: float32 scalar on the device that multiplies the gradient.
        found_inf: float32 scalar on the device; with anything but 0 no bit changes.
        lr, betas, eps, weight_decay: as `adamw` says.
        count: number of updates, this one included.
    """
    n = param.numel()
    beta1, beta2 = betas
    _adamw[(triton.cdiv(n, ELEMENTS),)](
        param, grad, m, v, param if copy is None else copy,
        scale, scale if found_inf is None else found_inf,
        n, lr, beta1, beta2, eps, 1.0 - lr * weight_decay,
        1.0 / (1.0 - beta1**count), 1.0 / (1.0 - beta2**count),
        HAS_COPY=copy is not None, HAS_FLAG=found_inf is not None, ELEMENTS=ELEMENTS, num_warps=4,
    )  # fmt: skip
