"""Multi-head latent attention: the keys and values of all heads are made of one narrow latent."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
from megatree.functional.param import Init, Param, ones
from megatree.functional.rotary import yarn_magnitude
from megatree.models.gpt_config import GPTConfig

_EPS = 1e-6
"""Of the norms of latents, whatever `norm_eps`: as published."""


def latent_params(cfg: GPTConfig, into: Init, out_of: Init) -> dict[str, Param]:
    """Declare the weights: those that narrow the residual stream, and those that read latents.

    Args:
        cfg: has a kv_rank.
        into: how weights begin that read the residual stream, or a latent.
        out_of: how those begin that write to it.
    """
    queries = {"wq": Param("kv_heads group query_dim embed", init=into)}
    if cfg.q_rank is not None:
        queries = {
            "wq_down": Param("q_rank embed", init=into),
            "norm_q": Param("q_rank", init=ones),
            "wq": Param("kv_heads group query_dim q_rank", init=into),
        }
    return {
        **queries,
        "wkv_down": Param("kv_rank embed", init=into),
        "norm_kv": Param("kv_rank", init=ones),
        "wk_rope": Param("rope_dim embed", init=into),
        "wk": Param("kv_heads head_dim kv_rank", init=into),
        "wv": Param("kv_heads value_dim kv_rank", init=into),
        "wo": Param("kv_heads group value_dim embed", init=out_of),
    }


def latent_sizes(cfg: GPTConfig) -> dict[str, int]:
    """Return the sizes of the axes that only these weights have."""
    if cfg.kv_rank is None or cfg.rope_dim is None or cfg.value_dim is None:
        return {}
    sizes = {"kv_rank": cfg.kv_rank, "rope_dim": cfg.rope_dim, "value_dim": cfg.value_dim}
    sizes["query_dim"] = cfg.head_dim + cfg.rope_dim
    return sizes if cfg.q_rank is None else {**sizes, "q_rank": cfg.q_rank}


def latent_heads(
    y: Tensor, w: Any, consts: Mapping[str, Tensor], cfg: GPTConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of the heads.

    Latents are made where the tokens lie ("batch seq_res"), and they are what is gathered: with
    sequence parallelism kv_rank + rope_dim (and q_rank) elements of a token travel, not embed.
    The last rope_dim elements of queries and keys turn, in pairs of neighbours; those of the keys
    are the same for all heads.

    Args:
        y: the normalised residual stream, laid out as that is.
        w: of `latent_params`.
        consts: "rope", for rope_dim.
        cfg: has a kv_rank.

    Returns:
        [b, t, kv_heads, group, query_dim], [b, t, kv_heads, query_dim] and
        [b, t, kv_heads, value_dim].

    Reference: DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C.
    """
    latent, turning = F.project(y, (w["wkv_down"], w["wk_rope"]))
    latent = shard(F.rms_norm(latent, w["norm_kv"], eps=_EPS), "batch seq kv_rank")
    turned = F.rope(shard(turning, "batch seq rope_dim"), consts["rope"], neighbours=True)
    k, v = F.project(latent, (w["wk"], w["wv"]))
    if cfg.q_rank is None:
        narrow = shard(y, "batch seq embed")
    else:
        narrow = F.rms_norm(F.linear(y, w["wq_down"]), w["norm_q"], eps=_EPS)
        narrow = shard(narrow, "batch seq q_rank")
    q = F.rope(F.linear(narrow, w["wq"]), consts["rope"], last=True, neighbours=True)
    return q, F.beside(k, turned), v


def latent_scale(cfg: GPTConfig) -> float:
    """Return what scores are multiplied by; positions that `yarn` slows make them larger."""
    assert cfg.rope_dim is not None
    scale = (cfg.head_dim + cfg.rope_dim) ** -0.5
    if cfg.yarn is None:
        return scale
    factor, _, _, _, _, of_all = cfg.yarn
    return scale * yarn_magnitude(factor, of_all) ** 2


def latent_rope_table(positions: Tensor, cfg: GPTConfig, **options: Any) -> Tensor:
    """Return the table that turns the last rope_dim elements; `options` of `rope_table`."""
    assert cfg.rope_dim is not None
    if cfg.yarn is None:
        return F.rope_table(positions, cfg.rope_dim, **options)
    factor, fast, slow, length, of_turned, of_all = cfg.yarn
    return F.rope_table(
        positions,
        cfg.rope_dim,
        yarn=(factor, fast, slow, length),
        magnitude=yarn_magnitude(factor, of_turned) / yarn_magnitude(factor, of_all),
        **options,
    )
