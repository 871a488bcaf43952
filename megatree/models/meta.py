"""Meta's own names and layouts of Llama (`consolidated.*.pth`, `params.json`), as data."""

from collections.abc import Mapping
from typing import Any

from megatree.models.gpt_config import GPTConfig
from megatree.models.names import Source
from megatree.models.stated import number

_TABLE, _GATE = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"
_LAYER, _TURNED = "layers.{layer}", "head_dim=half:2 pair"

META = (
    Source(leaf="embed.table", name="tok_embeddings.weight", axes="vocab embed"),
    *(
        Source(leaf=f"blocks.dense.{leaf}", name=f"{_LAYER}.{name}.weight", axes=axes, split=split)
        for leaf, name, axes, split in (
            ("norm1", "attention_norm", "embed", ""),
            # They turn neighbours, we turn halves.
            ("wq", "attention.wq", "(kv_heads group pair half) embed", _TURNED),
            ("wk", "attention.wk", "(kv_heads pair half) embed", _TURNED),
            ("wv", "attention.wv", "(kv_heads head_dim) embed", ""),
            ("wo", "attention.wo", "embed (kv_heads group head_dim)", ""),
            ("norm2", "ffn_norm", "embed", ""),
            ("w_gate", "feed_forward.w1", "ffn embed", ""),
            ("w_up", "feed_forward.w3", "ffn embed", ""),
            ("w_down", "feed_forward.w2", "embed ffn", ""),
        )
    ),
    Source(leaf="head.norm", name="norm.weight", axes="embed"),
    Source(leaf="head.table", name="output.weight", axes="vocab embed"),
)
"""The leaves of a Llama."""

CUT: Mapping[str, int] = {
    "tok_embeddings.weight": 1,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w3.weight": 0,
    "feed_forward.w2.weight": 1,
    "output.weight": 0,
}
"""End of a name -> the dim that model parallel files cut."""

IGNORED = ("rope.freqs",)
"""Tensors that are functions of the config."""


def to_gpt_config(
    params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str
) -> GPTConfig:
    """Return the sizes and choices of a params.json; widths that it does not say, of the tensors.

    Raises:
        ValueError: it lacks a size, or has something else where a number belongs.
    """
    lacking = [name for name in ("dim", "n_layers", "n_heads") if name not in params]
    if lacking:
        raise ValueError(f"{place}: lacks {', '.join(lacking)}. Give the params.json of the model.")
    absent = [name for name in (_TABLE, _GATE) if name not in shapes]
    if absent:
        raise ValueError(f"{place}: the files beside it lack {', '.join(absent)}. Copy them anew.")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "norm_eps"):
        if params.get(name) is not None:
            number(params, name, place)
    heads = params["n_heads"]
    kv_heads = params.get("n_kv_heads") or heads
    scaled = params.get("use_scaled_rope", False)
    factor = number(params, "rope_scaling_factor", place, 8.0)
    return GPTConfig(
        vocab_size=shapes[_TABLE][0],
        seq_length=params.get("max_seq_len", 131072 if scaled else 4096),
        num_layers=params["n_layers"],
        embed=params["dim"],
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head_dim=params["dim"] // heads,
        ffn=shapes[_GATE][0],
        tied="output.weight" not in shapes,
        norm_eps=params.get("norm_eps", 1e-5),
        rope_base=number(params, "rope_theta", place, 10000.0),
        # Llama 3.1 and later: these constants are in Meta's source, not in the file.
        rope_scaling=(factor, 1.0, 4.0, 8192.0) if scaled else None,
    )
