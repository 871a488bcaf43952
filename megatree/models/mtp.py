"""Multi-token prediction: layers behind the decoder that each predict a token one further ahead."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.chain import Block, Chain, Segment, Stack
from megatree.functional.loss import IGNORE
from megatree.functional.param import Param, normal
from megatree.models.gpt import head, norm, norm_params
from megatree.models.gpt_config import GPTConfig


def with_mtp(model: Chain, cfg: GPTConfig) -> Chain:
    """Add what predicts `cfg.mtp` further tokens: a stack "mtp" with kinds "depth1", "depth2", ...

    Depth d reads, at position i, what the depth before made of it (the decoder, after its last
    norm) and the embedding of token i + d; it passes both through norms of their own, a product,
    a layer like the decoder's last one and a norm, and predicts the label of position i + d with
    the decoder's own table of the embedding and of the head. The head computes the decoder's loss
    and hands on; where the chain ends with it (`up_to("head")`), nothing of this exists. In
    evaluation these layers compute nothing: the held-out loss is the decoder's.

    The term "mtp" is mtp_weight / mtp times the losses of all depths, each the mean over the
    predictions that count: position i + d exists, is of the same document, and has weight.

    Args:
        model: of `gpt` or `moe`, for a config without mtp.
        cfg: with mtp.

    Returns:
        The longer chain. Its further layers count as layers of a placement: with a pipeline the
        last stage holds them, the head, and a copy of the embedding's table, whose gradient is
        summed over both.

    Raises:
        ValueError: so far ahead no sequence has a token.

    Reference: DeepSeek-V3, arXiv:2412.19437, section 2.2.
    """
    assert cfg.mtp is not None
    if cfg.mtp >= cfg.seq_length:
        raise ValueError(
            f"with_mtp: mtp is {cfg.mtp}, and sequences have {cfg.seq_length} tokens: the last "
            f"depth would predict nothing. Give at most {cfg.seq_length - 1}, or mtp=None."
        )
    blocks = model.segments["blocks"]
    last = model.segments["head"]
    assert isinstance(blocks, Stack)
    assert isinstance(last, Segment)
    layer = blocks.kinds[blocks.pattern[-1]]
    borrows = {"table": "embed.table"} if cfg.tied else {"table": "embed.table",
                                                         "head": "head.table"}  # fmt: skip
    kinds = {
        f"depth{depth}": Segment(
            apply=partial(_predict, layer=layer.apply, depth=depth),
            params={**layer.params, **_joint_params(cfg)},
            borrows={**layer.borrows, **borrows},
            moves=layer.moves,
        )
        for depth in range(1, cfg.mtp + 1)
    }
    survey = {
        entry: {**rows, **{f"mtp.{kind}.{entry}": cfg.num_layers for kind in kinds}}
        for entry, rows in model.survey.items()
    }
    sizes = {**model.sizes, "mtp_embed": cfg.embed}
    if survey:
        sizes["depth"] += cfg.mtp
    kept = {name: s for name, s in model.segments.items() if name not in ("head", "loss")}
    return replace(
        model,
        segments={
            **kept,
            "head": Segment(
                apply=_lose_and_hand_on, params=last.params, borrows=last.borrows, end=head
            ),
            "mtp": Stack(kinds=kinds, pattern=tuple(kinds)),
        },
        cfg=cfg,
        eval_cfg=model.eval_cfg or model.cfg,  # without mtp: see `_predict`
        sizes=sizes,
        survey=survey,
        consts=partial(_consts, base=model.consts),
    )


def _joint_params(cfg: GPTConfig) -> dict[str, Param]:
    """Declare what joins a token's embedding to what came before, and the norm at the end."""
    weights = {name: Param("mtp_embed embed", init=normal(cfg.init_std))
               for name in ("w_token", "w_hidden")}  # fmt: skip
    norms = [norm_params(name, cfg) for name in ("norm_token", "norm_hidden", "norm_out")]
    return {**weights, **{name: leaf for each in norms for name, leaf in each.items()}}


def _consts(batch: Mapping[str, Tensor], cfg: GPTConfig, *, base: Any) -> Any:
    """Return the consts of the decoder and, per depth, tokens, labels and weights so far ahead."""
    consts = base(batch, cfg)
    if cfg.mtp is None:
        return consts
    # Two integers and a float of a token: whole rows cost nothing, and nothing else is exact where
    # the sequence is cut in two places per rank.
    whole = {
        name: shard(batch[name], "batch _")
        for name in ("tokens", "labels", "weights", "segments")
        if name in batch
    }
    for depth in range(1, cfg.mtp + 1):
        moved = {
            "tokens": F.ahead(whole["tokens"], by=depth, fill=0),
            "labels": F.ahead(whole["labels"], by=depth, fill=IGNORE),
            "weights": F.ahead(whole["weights"], by=depth, fill=0.0),
        }
        if "segments" in whole:
            same = F.ahead(whole["segments"], by=depth, fill=-1) == whole["segments"]
            moved["weights"] = torch.where(same, moved["weights"], 0.0)
        consts |= {f"{name}_{depth}": shard(x, "batch seq") for name, x in moved.items()}
    return consts


def _lose_and_hand_on(
    w: Any, carry: Tensor, consts: Mapping[str, Tensor], cfg: GPTConfig, *, state: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """Compute the decoder's loss, and return what it predicts from."""
    x = norm(carry, w, "norm", cfg)
    weights = consts["weights"]
    total = _loss(x, w["table"], consts["labels"], weights, cfg)
    return x, {"terms": {"loss": (total, weights.sum())}}


def _loss(x: Tensor, table: Tensor, labels: Tensor, weights: Tensor, cfg: GPTConfig) -> Tensor:
    x = shard(x, "batch seq embed")
    if cfg.fused_loss:
        return F.linear_cross_entropy(x, table, labels, weights, num_classes=cfg.vocab_size)
    nll = F.cross_entropy(F.linear(x, table), labels, num_classes=cfg.vocab_size)
    return (nll * weights).sum()


def _predict(
    w: Any,
    carry: Tensor,
    consts: Mapping[str, Tensor],
    cfg: GPTConfig,
    *,
    state: Any = None,
    layer: Block,
    depth: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Predict the token `depth` further ahead than the decoder does; in evaluation, nothing."""
    if cfg.mtp is None:  # the layer stays where it is placed, and costs nothing
        return carry, {}
    token = shard(F.embedding(consts[f"tokens_{depth}"], w["table"]), "batch seq_res embed")
    x = F.linear(norm(token, w, "norm_token", cfg), w["w_token"])
    x = x + F.linear(norm(carry, w, "norm_hidden", cfg), w["w_hidden"])
    # Keys of dropout are those of a layer behind all others.
    here = {**consts, "layer": consts["layer"] + cfg.num_layers}
    x, out = layer(w, x, here, cfg, state=state)
    x = norm(x, w, "norm_out", cfg)
    weights = consts[f"weights_{depth}"]
    table = w["table"] if cfg.tied else w["head"]
    total = _loss(x, table, consts[f"labels_{depth}"], weights, cfg)
    term = (total * (cfg.mtp_weight / cfg.mtp), weights.sum())
    return x, {**out, "terms": {**out.get("terms", {}), "mtp": term}}
