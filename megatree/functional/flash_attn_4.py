"""FlashAttention 4 (the package flash-attn-4) in place of torch's flash kernel."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

_registered: list[Any] = []  # torch takes the kernels back when nobody holds the handle


def installed() -> bool:
    """Whether the package is there."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None


def register() -> None:
    """Make torch's flash kernel that of FlashAttention 4, in this process and from now on.

    Attention with `kernel="fa4"` needs it; `kernel="flash"` gets it too.

    Raises:
        ValueError: the package is not installed.
    """
    if _registered:
        return
    if not installed():
        raise ValueError(
            "attention: kernel 'fa4' needs the package flash-attn-4, which is not installed. "
            "Install it, or use kernel='auto'."
        )
    from torch.nn.attention._fa4 import register_flash_attention_fa4

    _registered.append(register_flash_attention_fa4(__name__))


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """Attend with heads first, [b, h, t, k]; keys and values may have fewer heads.

    Raises:
        ValueError: nobody has called `register`.
    """
    if not _registered:
        raise ValueError(
            "attention: kernel 'fa4' has not been registered with torch. Call "
            "megatree.functional.flash_attn_4.register() at the start, or use kernel='auto'."
        )
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(q, k, v, 0.0, causal, scale=scale)[0]


def _flash_attn_fwd(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Give torch the two results it expects of the package's forward, which has more."""
    interface = importlib.import_module("flash_attn.cute.interface")
    return tuple(interface._flash_attn_fwd(*args, **options)[:2])


def _flash_attn_bwd(*args: Any, **options: Any) -> tuple[Any, ...]:
    """Give torch the three results it expects of the package's backward, which has more."""
    interface = importlib.import_module("flash_attn.cute.interface")
    return tuple(interface._flash_attn_bwd(*args, **options)[:3])
