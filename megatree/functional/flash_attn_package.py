"""The kernels of the flash-attn package (version 2.7 or later), where it is installed."""

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

_WHOLE: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


@cache
def installed() -> bool:
    """Whether the package is there."""
    # The package flash-attn-4 has a flash_attn of its own, without this module.
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the result [b, h, t, k] and its log-sum-exp [b, h, t] of heads-first operands."""
    out, lse, *_ = _interface()._flash_attn_forward(
        *(_tokens_first(x) for x in (q, k, v)),
        softmax_scale=scale,
        causal=causal,
        return_softmax=False,
        **_WHOLE,
    )
    return _tokens_first(out), lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of heads-first q, k and v, for a merged result and log-sum-exp."""
    first = [_tokens_first(x).contiguous() for x in (grad, q, k, v, out)]
    dq, dk, dv = (torch.empty_like(x) for x in first[1:4])
    _interface()._flash_attn_backward(
        *first,
        lse.contiguous(),
        dq,
        dk,
        dv,
        softmax_scale=scale,
        causal=causal,
        deterministic=False,
        **_WHOLE,
    )
    return _tokens_first(dq), _tokens_first(dk), _tokens_first(dv)


def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _tokens_first(x: Tensor) -> Tensor:
    """Swap heads and tokens, either way."""
    return x.transpose(1, 2)
