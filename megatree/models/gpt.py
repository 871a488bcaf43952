"""The dense decoder: one source that a config makes GPT-2, Llama or something between."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Array, Init, Param, normal, ones, zeros
from megatree.models.gpt_config import GPTConfig
from megatree.models.mla import (
    latent_heads,
    latent_params,
    latent_rope_table,
    latent_scale,
    latent_sizes,
)

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": F.gelu_tanh,
    "squared_relu": F.squared_relu,
}


def gpt(
    cfg: GPTConfig,
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    entries: Collection[str] = (),
) -> Chain:
    """Declare a dense decoder: segments embed, blocks, head (the carry becomes logits) and loss.

    With `cfg.fused_loss` the head computes the loss too and there is no segment after it; it still
    gives logits where the chain ends with it (`up_to("head")`).

    Args:
        cfg: sizes and choices.
        batch_size: sequences in a batch.
        dtype: dtype of the parameters.
        entries: what else the batch has, [batch, seq]: "segments", the document of every token, out
            of which none looks (rising along a row); "positions", which rotary angles and learned
            rows are taken at, in place of 0 .. seq-1 (masks go by the order of the row).

    Returns:
        A Chain. Its batch: tokens and labels (-100 is ignored), weights (the loss mask), and key
        if there is dropout. `outs["loss"]["terms"]["loss"]` is (sum of weighted losses in nats,
        sum of weights); `outs["head"]` has it if head and loss are one.
    """
    if cfg.mtp is not None:
        raise ValueError(
            f"gpt: mtp is {cfg.mtp}, and this builds the part without it. Build it by `decoder`."
        )
    batch = {
        "tokens": Array("batch seq", torch.int64),
        "labels": Array("batch seq", torch.int64),
        "weights": Array("batch seq", torch.float32),
    }
    if odd := sorted(set(entries) - {"positions", "segments"}):
        raise ValueError(f"gpt: entries are {odd}. Known are positions and segments.")
    batch.update({name: Array("batch seq", torch.int64) for name in sorted(entries)})
    if cfg.random:
        batch["key"] = Array("", torch.int64)
    borrows = {"table": "embed.table"} if cfg.tied else {}
    ends = {
        "head": Segment(apply=head, params=head_params(cfg), borrows=borrows),
        "loss": Segment(apply=loss),
    }
    if cfg.fused_loss:
        ends = {
            "head": Segment(apply=head_and_loss, params=head_params(cfg), borrows=borrows, end=head)
        }
    return Chain(
        segments={
            "embed": Segment(apply=embed, params=embed_params(cfg)),
            "blocks": Stack(
                kinds={"dense": Segment(apply=block, params=block_params(cfg))},
                pattern=("dense",) * cfg.num_layers,
            ),
            **ends,
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
            **latent_sizes(cfg),
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
            positions = shard(torch.arange(tokens.shape[1], device=tokens.device), "seq")
        if cfg.kv_rank is not None:
            consts["rope"] = latent_rope_table(positions, cfg, base=cfg.rope_base, dtype=dtype)
        else:
            consts["rope"] = F.rope_table(
                positions, cfg.head_dim, base=cfg.rope_base, scaling=cfg.rope_scaling, dtype=dtype
            )
    return consts


def embed_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare the embedding."""
    params = {"table": _table(cfg)}
    if cfg.positions == "learned":
        params["positions"] = Param("max_seq embed", init=normal(cfg.init_std))
    return params


def block_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare one block."""
    into, out_of = first_weights(cfg)
    weights = {
        "w_up": Param("ffn embed", init=into),
        "w_down": Param("ffn embed", init=out_of),
    }
    if cfg.activation == "swiglu":
        weights["w_gate"] = Param("ffn embed", init=into)
    biases = {}
    if cfg.bias:
        biases["b_down"] = Param("embed", init=zeros)
        biases |= {_bias(name): Param("ffn", init=zeros) for name in weights if name != "w_down"}
    return {**attention_params(cfg), **weights, **biases, **norm_params("norm2", cfg)}


def attention_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare the first half of a block: norm and attention."""
    into, out_of = first_weights(cfg)
    if cfg.kv_rank is not None:
        return {**latent_params(cfg, into, out_of), **norm_params("norm1", cfg)}
    weights = {
        "wq": Param("kv_heads group head_dim embed", init=into),
        "wk": Param("kv_heads head_dim embed", init=into),
        "wv": Param("kv_heads head_dim embed", init=into),
        "wo": Param("kv_heads group head_dim embed", init=out_of),
    }
    if cfg.bias:
        weights["bo"] = Param("embed", init=zeros)
    for name in ("wq", "wk", "wv") if cfg.bias or cfg.qkv_bias else ():
        weights[_bias(name)] = Param(weights[name].axes.removesuffix(" embed"), init=zeros)
    if cfg.qk_norm:
        weights["norm_q"] = Param("head_dim", init=ones)
        weights["norm_k"] = Param("head_dim", init=ones)
    return {**weights, **norm_params("norm1", cfg)}


def first_weights(cfg: GPTConfig) -> tuple[Init, Init]:
    """Return how weights that read the residual stream begin, and those that write to it."""
    return normal(cfg.init_std), normal(cfg.init_std / math.sqrt(2 * cfg.num_layers))


def head_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare the last norm and, untied, the table of the head."""
    own = {} if cfg.tied else {"table": _table(cfg)}
    return {**own, **norm_params("norm", cfg)}


def embed(
    w: Any, carry: None, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Turn tokens into the residual stream."""
    tokens = consts["tokens"]
    x = shard(F.embedding(tokens, w["table"]), "batch seq_res embed")
    if cfg.positions == "learned":
        if "positions" in consts:
            rows = F.embedding(consts["positions"], w["positions"])
            x = x + shard(rows, "batch seq_res embed")
        else:
            x = x + shard(w["positions"][: tokens.shape[1]], "seq_res embed")
    if cfg.dropout > 0.0:
        x = F.dropout(x, F.fold(consts["key"], "embed"), rate=cfg.dropout)
    return x, {}


def block(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Add attention, then the feed-forward layer, to the residual stream."""
    x = carry
    x = x + finish(attend(x, w, consts, cfg), w, "wo", consts, cfg)
    x = x + finish(feed_forward(x, w, cfg), w, "w_down", consts, cfg)
    return x, {}


def head(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Turn the residual stream into logits, cut along the vocabulary as the table is."""
    x = shard(norm(carry, w, "norm", cfg), "batch seq embed")
    return F.linear(x, w["table"]), {}


def loss(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[None, dict[str, Any]]:
    """Sum the weighted losses, and the weights; whoever divides knows the whole step."""
    weights = consts["weights"]
    nll = F.cross_entropy(carry, consts["labels"], num_classes=cfg.vocab_size)
    return None, {"terms": {"loss": ((nll * weights).sum(), weights.sum())}}


def head_and_loss(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[None, dict[str, Any]]:
    """Do what `head` and `loss` do, without logits."""
    x = shard(norm(carry, w, "norm", cfg), "batch seq embed")
    labels, weights = consts["labels"], consts["weights"]
    total = F.linear_cross_entropy(x, w["table"], labels, weights, num_classes=cfg.vocab_size)
    return None, {"terms": {"loss": (total, weights.sum())}}


def attend(x: Tensor, w: Any, consts: Mapping[str, Tensor], cfg: GPTConfig) -> Tensor:
    """Return what attention adds to the residual stream: a pending sum if heads are cut."""
    y = norm(x, w, "norm1", cfg)
    if cfg.kv_rank is not None:
        (q, k, v), scale = latent_heads(y, w, consts, cfg), latent_scale(cfg)
    else:
        (q, k, v), scale = _heads(shard(y, "batch seq embed"), w, consts, cfg), None
    key = F.fold(consts["key"], consts["layer"], "attention") if cfg.attention_dropout else None
    # A window that holds the whole sequence hides nothing.
    window = cfg.window if cfg.window is not None and cfg.window < q.shape[1] else None
    o = F.attention(
        q,
        k,
        v,
        key=key,
        segment_ids=consts.get("segments"),
        causal=True,
        window=window,
        scale=scale,
        dropout=cfg.attention_dropout,
        kernel=cfg.attention_kernel,
    )
    return F.einsum("b t g r k, g r k d -> b t d", o, w["wo"])


def _heads(
    y: Tensor, w: Any, consts: Mapping[str, Tensor], cfg: GPTConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of the heads."""
    q, k, v = F.project(y, (w["wq"], w["wk"], w["wv"]))
    if cfg.bias or cfg.qkv_bias:
        q, k, v = q + w["bq"], k + w["bk"], v + w["bv"]
    if cfg.qk_norm:
        q = F.rms_norm(q, w["norm_q"], eps=cfg.norm_eps)
        k = F.rms_norm(k, w["norm_k"], eps=cfg.norm_eps)
    if cfg.positions == "rotary":
        q, k = F.rope(q, consts["rope"]), F.rope(k, consts["rope"])
    return q, k, v


def feed_forward(x: Tensor, w: Any, cfg: GPTConfig) -> Tensor:
    """Return what the dense layer adds to the residual stream: a pending sum if it is cut."""
    y = shard(norm(x, w, "norm2", cfg), "batch seq embed")
    if cfg.activation == "swiglu":
        gate, up = F.project(y, (w["w_gate"], w["w_up"]))
        if cfg.bias:
            gate, up = gate + w["b_gate"], up + w["b_up"]
        hidden = F.swiglu(gate, up)
    else:
        up = F.linear(y, w["w_up"])
        hidden = ACTIVATIONS[cfg.activation](up + w["b_up"] if cfg.bias else up)
    return F.einsum("b t f, f d -> b t d", hidden, w["w_down"])


def finish(y: Tensor, w: Any, weight: str, consts: Mapping[str, Tensor], cfg: GPTConfig) -> Tensor:
    """Discharge the sum of a product, then add its bias (once, not once per rank) and drop."""
    y = shard(y, "batch seq_res embed")
    if cfg.bias:
        y = y + w[_bias(weight)]
    if cfg.dropout > 0.0:
        y = F.dropout(y, F.fold(consts["key"], consts["layer"], weight), rate=cfg.dropout)
    return y


def norm(x: Tensor, w: Any, name: str, cfg: GPTConfig) -> Tensor:
    """Normalise by the weights of a name."""
    if cfg.norm == "rms":
        return F.rms_norm(x, w[name], eps=cfg.norm_eps)
    return F.layer_norm(x, w[name], w.get(f"b_{name}"), eps=cfg.norm_eps)


def norm_params(name: str, cfg: GPTConfig) -> dict[str, Param]:
    """Declare the weights of a norm."""
    params = {name: Param("embed", init=ones)}
    if cfg.norm == "layer" and cfg.bias:
        params[f"b_{name}"] = Param("embed", init=zeros)
    return params


def _table(cfg: GPTConfig) -> Param:
    return Param("vocab embed", init=normal(cfg.init_std), pad=cfg.vocab_pad)


def _bias(weight: str) -> str:
    """Return the name of a weight's bias: bq of wq, b_up of w_up."""
    return f"b{weight[1:]}"
