"""What kind of work an event of a profile is, by its name."""

import re
from typing import Literal

Kind = Literal[
    "GEMM", "attention", "norm/elementwise", "loss", "optimizer", "communication", "copy", "idle"
]

WORK: tuple[Kind, ...] = (
    "GEMM", "attention", "loss", "optimizer", "norm/elementwise", "copy", "communication",
)  # fmt: skip
"""Kinds of busy time; where several run at once, the first of them is what the time is counted as,
so that communication is what compute does not hide."""

OPTIMIZER_MARK = "megatree: optimizer"
"""Range of the update: all that runs within it is the optimizer's."""

_KERNELS: tuple[tuple[Kind, str], ...] = (
    ("communication", r"nccl|gloo"),
    ("copy", r"^mem(cpy|set)\b"),
    ("optimizer", r"adamw|fused_adam"),
    # inductor names a fused kernel by all that it holds part of, views of attention too
    ("norm/elementwise", r"^triton_(poi|per|red|for)_(?!.*(softmax|nll_loss|cross_entropy))"),
    ("attention", r"flash|fmha|sdpa|cudnn::fusion|fused_attn|attention"),
    ("loss", r"^_(statistics|gradient)\b|softmax|nll_loss|cross_entropy"),
    ("GEMM", r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitk|triton_tem_"),
)
"""Kind -> what the name of a GPU's kernel holds; the first that fits decides. Fused attention may
be written in cutlass, so it stands before products."""

_OPS: tuple[tuple[Kind, str], ...] = (
    ("communication", r"nccl|gloo|c10d|record_param_comms"),
    ("optimizer", r"adamw|_fused_adam"),
    ("attention", r"^aten::.*(scaled_dot_product|flash_attention|efficient_attention)"),
    ("loss", r"^aten::(_?log_softmax|_softmax|nll_loss|cross_entropy|logsumexp)"),
    ("GEMM", r"^aten::(_grouped_mm|_scaled_mm|(add|b|badd)?bmm|(add)?m[mv]_?|matmul|linear"
             r"|einsum|dot)$|^mkl(dnn)?::_linear"),
    ("copy", r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|stack)$"),
    ("norm/elementwise", r"^(aten|prims|torchvision)::|CompiledFxGraph|Torch-Compiled Region"),
)  # fmt: skip
"""Kind -> what the name of a CPU's op holds; ops that only hold others (autograd's) have none."""

OUTERMOST: frozenset[Kind] = frozenset({"attention", "loss", "communication", "optimizer"})
"""Kinds that ops within them belong to: a softmax within attention is attention."""


def kind_of_kernel(name: str) -> Kind:
    """Return the kind of a GPU's kernel, copy or fill; what no other kind claims is elementwise.

    >>> kind_of_kernel("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT")
    'GEMM'
    """
    return _first(_KERNELS, name) or "norm/elementwise"


def kind_of_op(name: str) -> Kind | None:
    """Return the kind of a CPU's op; None for one that only holds others, or is none of a step's.

    >>> kind_of_op("aten::addmm"), kind_of_op("autograd::engine::evaluate_function: MmBackward0")
    ('GEMM', None)
    """
    return _first(_OPS, name)


def _first(table: tuple[tuple[Kind, str], ...], name: str) -> Kind | None:
    return next((kind for kind, pattern in table if re.search(pattern, name, re.IGNORECASE)), None)
