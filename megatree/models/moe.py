"""The decoder with experts: the dense one whose stack has a second kind of block."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.chain import Block, Chain, Segment, Stack
from megatree.functional.param import Array, Param, normal, zeros
from megatree.functional.router import (
    balance_loss,
    bias_move,
    capacity_of,
    check_choice,
    router_z_loss,
)
from megatree.models.gpt import (
    ACTIVATIONS,
    attend,
    attention_params,
    block,
    block_params,
    finish,
    first_weights,
    gpt,
    norm,
    norm_params,
)
from megatree.models.moe_config import MoEConfig


def moe(
    cfg: MoEConfig,
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    entries: Collection[str] = (),
) -> Chain:
    """Declare a decoder with experts: `gpt` with the block kinds "dense" and "moe".

    Tokens are routed where they are laid out as "batch seq_moe embed"; the mesh axes of `experts`
    must be among those of the two. `expert_ffn` cuts experts within, over other axes.

    Args:
        cfg: sizes and choices.
        batch_size, dtype, entries: see `gpt`.

    Returns:
        A Chain. Beside what `gpt` returns, `outs["blocks"]["moe"]` has the terms "balance" and
        "router_z" if they have coefficients (times these, averaged over microbatches, added over
        layers), and of every mixture "load", the tokens of each expert that it took, "drops", those
        of each that chose it and were dropped, and "entropy" of the load in nats.

    Raises:
        ValueError: the router cannot choose so (see `route`).
    """
    check_choice(
        cfg.experts, cfg.top_k, cfg.score, cfg.pre_softmax, cfg.groups, cfg.group_top_k
    )  # fmt: skip
    dense = gpt(cfg, batch_size=batch_size, dtype=dtype, entries=entries)
    kinds = {
        "dense": Segment(apply=block, params=block_params(cfg)),
        "moe": mixture_segment(moe_block, moe_params(cfg), cfg),
    }
    sizes = {
        "experts": cfg.experts,
        "choices": cfg.experts,
        "expert_ffn": cfg.expert_ffn,
        "seq_moe": cfg.seq_length,
    }
    if cfg.shared_ffn is not None:
        sizes["shared_ffn"] = cfg.shared_ffn
    batch, survey = dict(dense.batch), {}
    if cfg.balance is not None and cfg.balance_over == "global":
        batch["best"] = Array("depth choices", torch.float32)
        survey["best"] = {"blocks.moe.best": 0}
        sizes["depth"] = cfg.num_layers
    stack = Stack(kinds={kind: kinds[kind] for kind in dict.fromkeys(cfg.pattern)},
                  pattern=cfg.pattern)  # fmt: skip
    return replace(
        dense,
        segments={**dense.segments, "blocks": stack},
        sizes={**dense.sizes, **sizes},
        batch=batch,
        survey=survey,
        eval_cfg=None if cfg.for_evaluation() == cfg else cfg.for_evaluation(),
    )


def mixture_segment(apply: Block, params: Mapping[str, Param], cfg: MoEConfig) -> Segment:
    """Return a segment with a mixture in it, whose bias moves after a step if it has one."""
    moves = {} if cfg.bias_rate is None else {"router_bias": move_bias}
    return Segment(apply=apply, params=params, moves=moves)


def move_bias(metrics: Mapping[str, Tensor], cfg: MoEConfig) -> Tensor:
    """Return what a step adds to the bias of a layer: by the choices of all microbatches."""
    counts = (metrics["load"] + metrics["drops"]).double().sum(0)
    return bias_move(counts, rate=cfg.bias_rate or 0.0)


def moe_params(cfg: MoEConfig) -> dict[str, Param]:
    """Declare one block with experts."""
    return {**attention_params(cfg), **mixture_params(cfg), **norm_params("norm2", cfg)}


def mixture_params(cfg: MoEConfig) -> dict[str, Param]:
    """Declare the router and the experts of one block."""
    into, out_of = first_weights(cfg)
    names = ("w_gate", "w_up") if cfg.activation == "swiglu" else ("w_up",)
    weights = {name: Param("experts expert_ffn embed", init=into) for name in names}
    weights["w_down"] = Param("experts expert_ffn embed", init=out_of)
    weights["router"] = Param("choices embed", init=normal(cfg.init_std))
    if cfg.bias_rate is not None:
        weights["router_bias"] = Param("choices", init=zeros, dtype=torch.float32, trained=False)
    if cfg.shared_ffn is not None:
        weights |= {f"shared_{name[2:]}": Param("shared_ffn embed", init=into) for name in names}
        weights["shared_down"] = Param("shared_ffn embed", init=out_of)
    return weights


def moe_block(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: MoEConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Add attention, then the experts, to the residual stream."""
    x = carry
    x = x + finish(attend(x, w, consts, cfg), w, "wo", consts, cfg)
    return mixture(x, w, consts, cfg)


def mixture(
    x: Tensor, w: Any, consts: Mapping[str, Tensor], cfg: MoEConfig
) -> tuple[Tensor, dict[str, Any]]:
    """Add the experts to the residual stream; return it with loss terms and metrics."""
    y = norm(x, w, "norm2", cfg)
    tokens = shard(y, "batch seq_moe embed")
    logits = _logits(tokens, w, consts, cfg)
    gates, choice = _route(logits, w, cfg)
    capacity, kept = None, choice
    if cfg.capacity_factor is not None:
        capacity = capacity_of(x.shape[1], cfg.top_k, cfg.experts, cfg.capacity_factor)
        # Who is dropped is decided over whole sequences, from numbers that all ranks share.
        kept = F.drop_over_capacity(
            shard(F.stop_gradient(gates), "batch _ _"),
            shard(choice, "batch _ _"),
            num_experts=cfg.experts,
            capacity=capacity,
        )
        kept = shard(kept, "batch seq_moe _")
    gated = cfg.activation == "swiglu"
    names = ("w_gate", "w_up", "w_down") if gated else ("w_up", "w_down")
    meanwhile = ("shared_gate", "shared_up", "shared_down") if cfg.overlap_shared else ()
    routed = F.experts(
        tokens,
        gates,
        kept,
        [w[name] for name in names],
        shared=[w[name] for name in meanwhile],
        capacity=capacity if cfg.pad_to_capacity else None,
        activation=F.swiglu if gated else ACTIVATIONS[cfg.activation],
        products=cfg.products,
    )
    shared = None
    if meanwhile:
        routed, shared = routed
    elif cfg.shared_ffn is not None:
        shared = _shared(y, w)
    x = x + finish(routed, w, "w_down", consts, cfg)
    if shared is not None:
        x = x + finish(shared, w, "shared_down", consts, cfg)
    return x, _outputs(logits, choice, kept, consts, cfg)


def _logits(tokens: Tensor, w: Any, consts: Mapping[str, Tensor], cfg: MoEConfig) -> Tensor:
    """Return the router's logits, in float32 or better whatever the model's dtype."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    x = F.cast(tokens, wide)
    if cfg.jitter is not None:
        x = F.jitter(x, F.fold(consts["key"], consts["layer"], "router"), rate=cfg.jitter)
    return F.linear(x, F.cast(w["router"], wide))


def _route(logits: Tensor, w: Any, cfg: MoEConfig) -> tuple[Tensor, Tensor]:
    """Return the weights and numbers of the experts of every token."""
    if cfg.router == "sinkhorn":
        choice = F.top_k(F.sinkhorn(F.stop_gradient(logits)), cfg.top_k)[1]
        gates = F.weigh(
            logits,
            choice,
            score=cfg.score,
            pre_softmax=cfg.pre_softmax,
            normalise=cfg.normalise,
            scale=cfg.route_scale,
        )
        return gates, choice
    return F.route(
        logits,
        w["router_bias"] if cfg.bias_rate is not None else None,
        k=cfg.top_k,
        score=cfg.score,
        pre_softmax=cfg.pre_softmax,
        normalise=cfg.normalise,
        scale=cfg.route_scale,
        groups=cfg.groups,
        group_top_k=cfg.group_top_k,
    )


def _shared(y: Tensor, w: Any) -> Tensor:
    """Return what the expert that every token takes gives: a pending sum if it is cut."""
    whole = shard(y, "batch seq embed")
    gate, up = F.project(whole, (w["shared_gate"], w["shared_up"]))
    return F.einsum("b t f, f d -> b t d", F.swiglu(gate, up), w["shared_down"])


def _outputs(
    logits: Tensor,
    choice: Tensor,
    kept: Tensor,
    consts: Mapping[str, Tensor],
    cfg: MoEConfig,
) -> dict[str, Any]:
    """Return loss terms and metrics of the routing of one layer."""
    terms: dict[str, tuple[Tensor, Tensor]] = {}
    metrics: dict[str, Any] = {}
    # A microbatch counts once on every mesh, whatever its masks: the step averages over them.
    once = torch.ones((), device=logits.device)
    if cfg.balance is not None:
        probabilities = F.router_probabilities(logits, score=cfg.score)
        # The router's own preference is balanced: the best scores, before bias, groups and drops.
        best = F.top_k(F.stop_gradient(logits), cfg.top_k)[1]
        counts = F.expert_counts(best, num_experts=cfg.experts)
        if cfg.balance_over == "sequence":
            counts = shard(counts, "batch _")
        else:
            counts = shard(counts.sum(0), "_")
        if cfg.balance_over == "global":
            metrics["best"] = counts
            if "best" in consts:  # zero where a step has one microbatch: then these are all
                whole = F.embedding(consts["layer"], consts["best"])
                counts = torch.where(whole.sum() > 0, whole, counts)
        loss = balance_loss(probabilities, counts, k=cfg.top_k)
        terms["balance"] = (loss * cfg.balance, once)
    if cfg.z_loss is not None:
        terms["router_z"] = (router_z_loss(logits) * cfg.z_loss, once)
    load = shard(F.expert_counts(kept, num_experts=cfg.experts).sum(0), "_")
    chosen = load
    if cfg.capacity_factor is not None:
        chosen = shard(F.expert_counts(choice, num_experts=cfg.experts).sum(0), "_")
    share = load / load.sum()
    metrics |= {
        "load": load,
        "drops": chosen - load,
        "entropy": -torch.xlogy(share, share).sum(),
    }
    return {"terms": terms, **metrics} if terms else metrics
