"""Maths on plain tensors and trees, and the vocabulary in which models are written."""

from megatree.functional.activations import gelu, gelu_tanh, silu, squared_relu, swiglu
from megatree.functional.ahead import ahead
from megatree.functional.annotate import as_partial, shard
from megatree.functional.attention import attention
from megatree.functional.beside import beside
from megatree.functional.casts import cast, stop_gradient
from megatree.functional.contraction import einsum, linear, project
from megatree.functional.dispatch import experts
from megatree.functional.dropout import dropout
from megatree.functional.embedding import embedding
from megatree.functional.jitter import jitter
from megatree.functional.keys import fold
from megatree.functional.linear_loss import linear_cross_entropy
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
from megatree.functional.router import (
    drop_over_capacity,
    expert_counts,
    route,
    router_probabilities,
    weigh,
)
from megatree.functional.sinkhorn import sinkhorn

__all__ = [
    "Out",
    "ahead",
    "as_partial",
    "attention",
    "beside",
    "cast",
    "cross_entropy",
    "cumsum",
    "drop_over_capacity",
    "dropout",
    "einsum",
    "embedding",
    "expert_counts",
    "experts",
    "fold",
    "gelu",
    "gelu_tanh",
    "jitter",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "local_map",
    "log_softmax",
    "mean",
    "op",
    "project",
    "rms_norm",
    "rope",
    "rope_table",
    "route",
    "router_probabilities",
    "shard",
    "silu",
    "sinkhorn",
    "softmax",
    "squared_relu",
    "stop_gradient",
    "sum",
    "swiglu",
    "top_k",
    "weigh",
]
