"""Maths on plain tensors and trees, and the vocabulary in which models are written."""

from megatree.functional.activations import gelu, gelu_tanh, silu, squared_relu, swiglu
from megatree.functional.annotate import as_partial, shard
from megatree.functional.attention import attention
from megatree.functional.casts import cast, stop_gradient
from megatree.functional.contraction import einsum, linear, project
from megatree.functional.dropout import dropout
from megatree.functional.embedding import embedding
from megatree.functional.keys import fold
from megatree.functional.local_map import Out, local_map
from megatree.functional.loss import cross_entropy
from megatree.functional.norms import layer_norm, rms_norm
from megatree.functional.op import op
from megatree.functional.reductions import (
    cumsum,
    log_softmax,
    mean,
    softmax,
    sum,  # noqa: A004
    top_k,
)
from megatree.functional.rotary import rope, rope_table

__all__ = [
    "Out",
    "as_partial",
    "attention",
    "cast",
    "cross_entropy",
    "cumsum",
    "dropout",
    "einsum",
    "embedding",
    "fold",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "local_map",
    "log_softmax",
    "mean",
    "op",
    "project",
    "rms_norm",
    "rope",
    "rope_table",
    "shard",
    "silu",
    "softmax",
    "squared_relu",
    "stop_gradient",
    "sum",
    "swiglu",
    "top_k",
]
