"""The dense decoder: one source that a config makes GPT-2, Llama or something between."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Array, Param, normal, ones, zeros

Norm = Literal["rms", "layer"]
Positions = Literal["rotary", "learned"]
Activation = Literal["swiglu", "gelu", "gelu_tanh", "squared_relu"]

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": F.gelu_tanh,
    "squared_relu": F.squared_relu,
}
_CHOICES = {"norm": Norm, "positions": Positions, "activation": Activation}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes and choices of a dense decoder.

    Args:
        vocab_size: number of tokens that exist.
        seq_length: tokens per sequence (the longest, with learned positions).
        num_layers: number of blocks.
        embed: width of the residual stream.
        kv_heads: number of key heads; a query head per key head and group.
        group: query heads per key head.
        head_dim: width of a head.
        ffn: width of the feed-forward layer.
        norm: RMSNorm or LayerNorm, before each half of a block and before the head.
        positions: rotary, or a learned table added to the embedding.
        activation: of the feed-forward layer; "swiglu" is the gated one.
        bias: whether products and LayerNorms have one.
        tied: whether the head reads the embedding's table.
        dropout: rate on the embedding and on what each half of a block adds.
        attention_dropout: rate on attention weights.
        norm_eps: added to mean squares and variances.
        rope_base: see `rope_table`.
        vocab_pad: the table is allocated at the next multiple of this many rows.
        init_std: standard deviation of the first weights; of those that write to the residual
            stream, it is divided by sqrt(2 num_layers).

    Raises:
        ValueError: a size is not positive, a choice unknown, or two fields contradict.
    """

    vocab_size: int
    seq_length: int
    num_layers: int
    embed: int
    kv_heads: int
    group: int = 1
    head_dim: int
    ffn: int
    norm: Norm = "rms"
    positions: Positions = "rotary"
    activation: Activation = "swiglu"
    bias: bool = False
    tied: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    vocab_pad: int = 1
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"GPTConfig: {field.name} is {value}. Give at least 1.")
            if field.name in _CHOICES and value not in (known := get_args(_CHOICES[field.name])):
                raise ValueError(
                    f"GPTConfig: {field.name} is {value!r}. Use one of {', '.join(known)}."
                )
            if field.name in ("dropout", "attention_dropout") and not 0.0 <= value < 1.0:
                raise ValueError(f"GPTConfig: {field.name} is {value}. Give a rate in [0, 1).")
            if field.name in ("norm_eps", "rope_base", "init_std") and value <= 0.0:
                raise ValueError(f"GPTConfig: {field.name} is {value}. Give a positive number.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"GPTConfig: head_dim is {self.head_dim}, and rotary positions turn pairs. "
                "Make head_dim even."
            )

    @property
    def num_heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.group

    @property
    def random(self) -> bool:
        """Whether a step needs a key."""
        return self.dropout > 0.0 or self.attention_dropout > 0.0


def gpt(
    cfg: GPTConfig,
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    explicit_positions: bool = False,
) -> Chain:
    """Declare a dense decoder: segments embed, blocks, head (the carry becomes logits) and loss.

    Args:
        cfg: sizes and choices.
        batch_size: sequences in a batch.
        dtype: dtype of the parameters.
        explicit_positions: whether the batch has "positions", for sequences that are permuted or
            do not start at 0; if not, they are 0 .. seq-1.

    Returns:
        A Chain. Its batch: tokens and labels (-100 is ignored), weights (the loss mask), and key
        if there is dropout. `outs["loss"]["terms"]["loss"]` is (sum of weighted losses in nats,
        sum of weights).
    """
    batch = {
        "tokens": Array("batch seq", torch.int64),
        "labels": Array("batch seq", torch.int64),
        "weights": Array("batch seq", torch.float32),
    }
    if explicit_positions:
        batch["positions"] = Array("seq", torch.int64)
    if cfg.random:
        batch["key"] = Array("", torch.int64)
    borrows = {"table": "embed.table"} if cfg.tied else {}
    return Chain(
        segments={
            "embed": Segment(apply=embed, params=embed_params(cfg)),
            "blocks": Stack(
                kinds={"dense": Segment(apply=block, params=block_params(cfg))},
                pattern=("dense",) * cfg.num_layers,
            ),
            "head": Segment(apply=head, params=head_params(cfg), borrows=borrows),
            "loss": Segment(apply=loss),
        },
        cfg=cfg,
        sizes={
            "batch": batch_size,
            "seq": cfg.seq_length,
            "seq_res": cfg.seq_length,
            "max_seq": cfg.seq_length,
            "vocab": cfg.vocab_size,
            "embed": cfg.embed,
            "kv_heads": cfg.kv_heads,
            "group": cfg.group,
            "head_dim": cfg.head_dim,
            "ffn": cfg.ffn,
        },
        batch=batch,
        consts=partial(consts_of, dtype=torch.promote_types(dtype, torch.float32)),
        dtype=dtype,
        eval_cfg=replace(cfg, dropout=0.0, attention_dropout=0.0) if cfg.random else None,
    )


def consts_of(
    batch: Mapping[str, Tensor], cfg: GPTConfig, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the batch, and the table of `rope` if positions are rotary."""
    consts = dict(batch)
    if cfg.positions == "rotary":
        positions = batch.get("positions")
        if positions is None:
            tokens = batch["tokens"]
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        consts["rope"] = F.rope_table(positions, cfg.head_dim, base=cfg.rope_base, dtype=dtype)
    return consts


def embed_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare the embedding."""
    params = {"table": _table(cfg)}
    if cfg.positions == "learned":
        params["positions"] = Param("max_seq embed", init=normal(cfg.init_std))
    return params


def block_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare one block."""
    into, out_of = normal(cfg.init_std), normal(cfg.init_std / math.sqrt(2 * cfg.num_layers))
    weights = {
        "wq": Param("kv_heads group head_dim embed", init=into),
        "wk": Param("kv_heads head_dim embed", init=into),
        "wv": Param("kv_heads head_dim embed", init=into),
        "wo": Param("kv_heads group head_dim embed", init=out_of),
        "w_up": Param("ffn embed", init=into),
        "w_down": Param("ffn embed", init=out_of),
    }
    if cfg.activation == "swiglu":
        weights["w_gate"] = Param("ffn embed", init=into)
    if cfg.bias:
        for name in ("wq", "wk", "wv", "w_gate", "w_up"):
            if name in weights:
                axes = weights[name].axes.removesuffix(" embed")
                weights[_bias(name)] = Param(axes, init=zeros)
        for name in ("wo", "w_down"):
            weights[_bias(name)] = Param("embed", init=zeros)
    return {**weights, **_norm_params("norm1", cfg), **_norm_params("norm2", cfg)}


def head_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare the last norm and, untied, the table of the head."""
    own = {} if cfg.tied else {"table": _table(cfg)}
    return {**own, **_norm_params("norm", cfg)}


def embed(
    w: Any, carry: None, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Turn tokens into the residual stream."""
    tokens = consts["tokens"]
    x = shard(F.embedding(tokens, w["table"]), "batch seq_res embed")
    if cfg.positions == "learned":
        positions = consts.get("positions")
        rows = (
            w["positions"][: tokens.shape[1]]
            if positions is None
            else F.embedding(positions, w["positions"])
        )
        x = x + shard(rows, "seq_res embed")
    if cfg.dropout > 0.0:
        x = F.dropout(x, F.fold(consts["key"], "embed"), rate=cfg.dropout)
    return x, {}


def block(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Add attention, then the feed-forward layer, to the residual stream."""
    x = carry
    x = x + _finish(_attend(x, w, consts, cfg), w, "wo", consts, cfg)
    x = x + _finish(_feed_forward(x, w, cfg), w, "w_down", consts, cfg)
    return x, {}


def head(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Turn the residual stream into logits, cut along the vocabulary as the table is."""
    x = shard(_norm(carry, w, "norm", cfg), "batch seq embed")
    return F.linear(x, w["table"]), {}


def loss(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[None, dict[str, Any]]:
    """Sum the weighted losses, and the weights; whoever divides knows the whole step."""
    weights = consts["weights"]
    nll = F.cross_entropy(carry, consts["labels"], num_classes=cfg.vocab_size)
    return None, {"terms": {"loss": ((nll * weights).sum(), weights.sum())}}


def _attend(x: Tensor, w: Any, consts: Mapping[str, Tensor], cfg: GPTConfig) -> Tensor:
    y = shard(_norm(x, w, "norm1", cfg), "batch seq embed")
    q, k, v = F.project(y, (w["wq"], w["wk"], w["wv"]))
    if cfg.bias:
        q, k, v = q + w["bq"], k + w["bk"], v + w["bv"]
    if cfg.positions == "rotary":
        q, k = F.rope(q, consts["rope"]), F.rope(k, consts["rope"])
    key = F.fold(consts["key"], consts["layer"], "attention") if cfg.attention_dropout else None
    o = F.attention(
        q, k, v, consts.get("positions"), None, key, causal=True, dropout=cfg.attention_dropout
    )
    return F.einsum("b t g r k, g r k d -> b t d", o, w["wo"])


def _feed_forward(x: Tensor, w: Any, cfg: GPTConfig) -> Tensor:
    y = shard(_norm(x, w, "norm2", cfg), "batch seq embed")
    if cfg.activation == "swiglu":
        gate, up = F.project(y, (w["w_gate"], w["w_up"]))
        if cfg.bias:
            gate, up = gate + w["b_gate"], up + w["b_up"]
        hidden = F.swiglu(gate, up)
    else:
        up = F.linear(y, w["w_up"])
        hidden = _ACTIVATIONS[cfg.activation](up + w["b_up"] if cfg.bias else up)
    return F.einsum("b t f, f d -> b t d", hidden, w["w_down"])


def _finish(y: Tensor, w: Any, weight: str, consts: Mapping[str, Tensor], cfg: GPTConfig) -> Tensor:
    """Discharge the sum of a product, then add its bias (once, not once per rank) and drop."""
    y = shard(y, "batch seq_res embed")
    if cfg.bias:
        y = y + w[_bias(weight)]
    if cfg.dropout > 0.0:
        y = F.dropout(y, F.fold(consts["key"], consts["layer"], weight), rate=cfg.dropout)
    return y


def _norm(x: Tensor, w: Any, name: str, cfg: GPTConfig) -> Tensor:
    if cfg.norm == "rms":
        return F.rms_norm(x, w[name], eps=cfg.norm_eps)
    return F.layer_norm(x, w[name], w.get(f"b_{name}"), eps=cfg.norm_eps)


def _norm_params(name: str, cfg: GPTConfig) -> dict[str, Param]:
    params = {name: Param("embed", init=ones)}
    if cfg.norm == "layer" and cfg.bias:
        params[f"b_{name}"] = Param("embed", init=zeros)
    return params


def _table(cfg: GPTConfig) -> Param:
    return Param("vocab embed", init=normal(cfg.init_std), pad=cfg.vocab_pad)


def _bias(weight: str) -> str:
    """Return the name of a weight's bias: bq of wq, b_up of w_up."""
    return f"b{weight[1:]}"
