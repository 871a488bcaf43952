"""The decoder with experts: the dense one whose stack has a second kind of block."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Param, normal
from megatree.functional.router import (
    balance_loss,
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
        layers), and of every mixture "load", the tokens of each expert that it chose and that were
        not dropped, "drops", how many choices were, and "entropy" of the load in nats.

    Raises:
        ValueError: the router cannot choose so (see `route`).
    """
    check_choice(
        cfg.experts, cfg.top_k, cfg.score, cfg.pre_softmax, cfg.groups, cfg.group_top_k
    )  # fmt: skip
    dense = gpt(cfg, batch_size=batch_size, dtype=dtype, entries=entries)
    kinds = {
        "dense": Segment(apply=block, params=block_params(cfg)),
        "moe": Segment(apply=moe_block, params=moe_params(cfg)),
    }
    sizes = {
        "experts": cfg.experts,
        "choices": cfg.experts,
        "expert_ffn": cfg.expert_ffn,
        "seq_moe": cfg.seq_length,
    }
    if cfg.shared_ffn is not None:
        sizes["shared_ffn"] = cfg.shared_ffn
    stack = Stack(kinds={kind: kinds[kind] for kind in dict.fromkeys(cfg.pattern)},
                  pattern=cfg.pattern)  # fmt: skip
    return replace(
        dense,
        segments={**dense.segments, "blocks": stack},
        sizes={**dense.sizes, **sizes},
    )


def moe_params(cfg: MoEConfig) -> dict[str, Param]:
    """Declare one block with experts."""
    into, out_of = first_weights(cfg)
    names = ("w_gate", "w_up") if cfg.activation == "swiglu" else ("w_up",)
    weights = {name: Param("experts expert_ffn embed", init=into) for name in names}
    weights["w_down"] = Param("experts expert_ffn embed", init=out_of)
    weights["router"] = Param("choices embed", init=normal(cfg.init_std))
    if cfg.shared_ffn is not None:
        weights |= {f"shared_{name[2:]}": Param("shared_ffn embed", init=into) for name in names}
        weights["shared_down"] = Param("shared_ffn embed", init=out_of)
    return {**attention_params(cfg), **weights, **norm_params("norm2", cfg)}


def moe_block(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: MoEConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Add attention, then the experts, to the residual stream."""
    x = carry
    x = x + finish(attend(x, w, consts, cfg), w, "wo", consts, cfg)
    y = norm(x, w, "norm2", cfg)
    tokens = shard(y, "batch seq_moe embed")
    wide = torch.promote_types(tokens.dtype, torch.float32)
    logits = F.linear(F.cast(tokens, wide), F.cast(w["router"], wide))
    gates, choice = F.route(
        logits,
        k=cfg.top_k,
        score=cfg.score,
        pre_softmax=cfg.pre_softmax,
        normalise=cfg.normalise,
        scale=cfg.route_scale,
        groups=cfg.groups,
        group_top_k=cfg.group_top_k,
    )
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
    names = ("w_gate", "w_up", "w_down") if cfg.activation == "swiglu" else ("w_up", "w_down")
    routed = F.experts(
        tokens,
        gates,
        kept,
        [w[name] for name in names],
        capacity=capacity if cfg.pad_to_capacity else None,
        activation=F.swiglu if cfg.activation == "swiglu" else ACTIVATIONS[cfg.activation],
        products=cfg.products,
    )
    x = x + finish(routed, w, "w_down", consts, cfg)
    if cfg.shared_ffn is not None:
        x = x + finish(_shared(y, w), w, "shared_down", consts, cfg)
    return x, _outputs(logits, choice, kept, cfg)


def _shared(y: Tensor, w: Any) -> Tensor:
    """Return what the expert that every token takes gives: a pending sum if it is cut."""
    whole = shard(y, "batch seq embed")
    gate, up = F.project(whole, (w["shared_gate"], w["shared_up"]))
    return F.einsum("b t f, f d -> b t d", F.swiglu(gate, up), w["shared_down"])


def _outputs(logits: Tensor, choice: Tensor, kept: Tensor, cfg: MoEConfig) -> dict[str, Any]:
    """Return loss terms and metrics of the routing of one layer."""
    terms: dict[str, tuple[Tensor, Tensor]] = {}
    # A microbatch counts once on every mesh, whatever its masks: the step averages over them.
    once = torch.ones((), device=logits.device)
    if cfg.balance is not None:
        probabilities = F.router_probabilities(logits, score=cfg.score)
        # The router's own preference is balanced: the best scores, before groups and drops.
        best = F.top_k(F.stop_gradient(logits), cfg.top_k)[1]
        counts = F.expert_counts(best, num_experts=cfg.experts)
        if cfg.balance_over == "sequence":
            counts = shard(counts, "batch _")
        else:
            counts = shard(counts.sum(0), "_")
        loss = balance_loss(probabilities, counts, k=cfg.top_k)
        terms["balance"] = (loss * cfg.balance, once)
    if cfg.z_loss is not None:
        terms["router_z"] = (router_z_loss(logits) * cfg.z_loss, once)
    load = shard(F.expert_counts(kept, num_experts=cfg.experts).sum(0), "_")
    share = load / load.sum()
    metrics = {
        "load": load,
        "drops": choice.shape[0] * choice.shape[1] * cfg.top_k - load.sum(),
        "entropy": -torch.xlogy(share, share).sum(),
    }
    return {"terms": terms, **metrics} if terms else metrics
