"""Megatron's names and layouts for the leaves of `gpt`, and its arguments, as data."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatree.models.gpt_config import GPTConfig
from megatree.models.names import Source
from megatree.models.stated import number

_QKV = "(kv_heads slot:group+2 head_dim)"
# How the rows of query_key_value were ordered before checkpoint version 2 (one group a head).
_OLD_QKV = {
    0: "(tp_rank part:3 heads_local head_dim)",
    1: "(tp_rank heads_local head_dim part:3)",
}


def sources(
    cfg: GPTConfig, *, stacked: bool, tensor: int = 1, version: int = 3
) -> tuple[Source, ...]:
    """Return where Megatron keeps the leaves.

    Args:
        cfg: the model.
        stacked: one tensor for all layers and norms named as Transformer Engine fuses them, as in
            `torch_dist`; if not, one a layer.
        tensor: ranks whose parts of the gated product follow one another, each gate and up.
        version: of the legacy checkpoint: 0 and 1 order the rows of queries, keys, values
            otherwise.
    """
    rows = _OLD_QKV.get(version)
    attention, mlp = "self_attention.linear_qkv", "mlp.linear_fc1"
    norm1, norm2 = f"{attention}.layer_norm_", f"{mlp}.layer_norm_"
    if not stacked:
        norm1, norm2 = "input_layernorm.", "pre_mlp_layernorm."
    out: list[Source] = []

    def add(leaf: str, name: str, axes: str, at: Any = None, split: str = "") -> None:
        out.append(Source(leaf=leaf, name=name, axes=axes, at=at, split=split))

    def layer(leaf: str, name: str, axes: str, at: Any = None, split: str = "") -> None:
        path = f"decoder.layers.{name}" if stacked else f"decoder.layers.{{layer}}.{name}"
        add(f"blocks.dense.{leaf}", path, f"layers {axes}" if stacked else axes, at, split)

    add("embed.table", "embedding.word_embeddings.weight", "vocab embed")
    add("embed.positions", "embedding.position_embeddings.weight", "max_seq embed")
    for index, one in enumerate("qkv"):
        slot, axes, split = ("slot", 0 if one == "q" else index - 3), _QKV, ""
        if rows is not None:
            slot, axes, split = ("part", index), rows, f"kv_heads=tp_rank:{tensor} heads_local"
            if one == "q":
                axes = axes.replace("head_dim", "group head_dim")
        layer(f"w{one}", f"{attention}.weight", f"{axes} embed", slot, split)
        layer(f"b{one}", f"{attention}.bias", axes, slot, split)
    layer("wo", "self_attention.linear_proj.weight", "embed (kv_heads group head_dim)")
    layer("bo", "self_attention.linear_proj.bias", "embed")
    layer("norm_q", "self_attention.q_layernorm.weight", "head_dim")
    layer("norm_k", "self_attention.k_layernorm.weight", "head_dim")
    if cfg.activation == "swiglu":
        split = f"ffn=tp_rank:{tensor} ffn_local"
        for index, one in enumerate(("gate", "up")):
            axes = "(tp_rank gate_up:2 ffn_local)"
            layer(f"w_{one}", f"{mlp}.weight", f"{axes} embed", ("gate_up", index), split)
            layer(f"b_{one}", f"{mlp}.bias", axes, ("gate_up", index), split)
    else:
        layer("w_up", f"{mlp}.weight", "ffn embed")
        layer("b_up", f"{mlp}.bias", "ffn")
    layer("w_down", "mlp.linear_fc2.weight", "embed ffn")
    layer("b_down", "mlp.linear_fc2.bias", "embed")
    for leaf, name in (("norm1", norm1), ("norm2", norm2)):
        layer(leaf, f"{name}weight", "embed")
        layer(f"b_{leaf}", f"{name}bias", "embed")
    add("head.norm", "decoder.final_layernorm.weight", "embed")
    add("head.b_norm", "decoder.final_layernorm.bias", "embed")
    add("head.table", "output_layer.weight", "vocab embed")
    return tuple(out)


CUT: Mapping[str, int] = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc1.bias": 0,
    "mlp.linear_fc2.weight": 1,
}
"""End of a name -> the dim that tensor ranks cut; the others are the same on all ranks."""

_BEFORE = ("embedding.word_embeddings.", "embedding.position_embeddings.")
_AFTER = ("decoder.final_layernorm.", "output_layer.")
_NORM1, _NORM2, _PROJ = "input_layernorm.", "pre_mlp_layernorm.", "self_attention.linear_proj."
_QKV_NORMS = ("self_attention.linear_qkv.", "self_attention.q_layernorm.",
              "self_attention.k_layernorm.")  # fmt: skip
_MLP = ("mlp.linear_fc1.", "mlp.linear_fc2.")
_LAYER_ORDER = (_NORM1, _PROJ, *_QKV_NORMS, _NORM2, *_MLP)
_FUSED_ORDER = (_PROJ, _NORM1, *_QKV_NORMS, _NORM2, *_MLP)


def in_order(names: Iterable[str], *, fused: bool = False) -> list[str]:
    """Return names of a model's parameters as Megatron's modules list them.

    Args:
        names: as `modern_name` gives them, layers numbered.
        fused: whether layers are of Transformer Engine, whose products have the norms before them.

    Raises:
        ValueError: a name is unknown.
    """
    within = _FUSED_ORDER if fused else _LAYER_ORDER

    def place(name: str) -> tuple[int, int, int, bool]:
        layer, rest = 0, name
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name, re.ASCII)
        if match:
            layer, rest = int(match[1]), match[2]
        for section, starts in ((0, _BEFORE), (1, within), (2, _AFTER)):
            if (section == 1) == bool(match):
                for index, start in enumerate(starts):
                    if rest.startswith(start):
                        return section, layer, index, rest.endswith("bias")
        raise ValueError(f"{name}: no parameter of Megatron's GPT that is known. Leave it out.")

    return sorted(names, key=place)


MODERN: Mapping[str, str] = {
    "language_model.embedding.": "embedding.",
    "language_model.transformer.": "decoder.",
    "language_model.encoder.": "decoder.",
    "language_model.output_layer.": "output_layer.",
    "word_embeddings_for_head.": "output_layer.",
    ".attention.": ".self_attention.",
    ".query_key_value.": ".linear_qkv.",
    ".self_attention.dense.": ".self_attention.linear_proj.",
    ".dense_h_to_4h.": ".linear_fc1.",
    ".dense_4h_to_h.": ".linear_fc2.",
    ".input_norm.": ".input_layernorm.",
    ".post_attention_norm.": ".pre_mlp_layernorm.",
    ".post_attention_layernorm.": ".pre_mlp_layernorm.",
    "decoder.final_norm.": "decoder.final_layernorm.",
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
"""Part of a name of before megatron.core, or of Transformer Engine -> that of today's own layers;
in this order."""


def modern_name(name: str) -> str:
    """Return the name that today's Megatron, without Transformer Engine, gives a tensor.

    >>> modern_name("language_model.transformer.layers.3.attention.dense.bias")
    'decoder.layers.3.self_attention.linear_proj.bias'
    """
    for old, new in MODERN.items():
        name = name.replace(old, new)
    return name


def to_gpt_config(args: Mapping[str, Any], place: str) -> GPTConfig:
    """Return the sizes and choices that Megatron's arguments state.

    Raises:
        ValueError: they ask for what we do not compute, or lack a size.
    """
    lacking = [name for name in _SIZES if args.get(name) is None]
    if lacking:
        raise ValueError(f"{place}: the arguments lack {', '.join(lacking)}. Give --like CONFIG.")
    for name, wanted in _NEEDS.items():
        if args.get(name, wanted) not in (wanted, None):
            raise ValueError(
                f"{place}: {name} is {args[name]!r}, and only {wanted!r} is computed here. "
                "Convert a model without it."
            )
    heads = args["num_attention_heads"]
    kv_heads = heads
    if args.get("group_query_attention"):
        kv_heads = args.get("num_query_groups") or heads
    rotary = (
        args.get("position_embedding_type") == "rope"
        or args.get("use_rotary_position_embeddings") is True
    )
    bias = bool(args.get("add_bias_linear", True))
    base = {"rotary_base": args.get("rotary_base") or 10000.0}
    return GPTConfig(
        vocab_size=args.get("true_vocab_size")
        or args.get("vocab_size")
        or args["padded_vocab_size"],
        seq_length=args.get("max_position_embeddings") or args["seq_length"],
        num_layers=args["num_layers"],
        embed=args["hidden_size"],
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head_dim=args.get("kv_channels") or args["hidden_size"] // heads,
        ffn=args.get("ffn_hidden_size") or 4 * args["hidden_size"],
        norm="rms" if args.get("normalization") == "RMSNorm" else "layer",
        positions="rotary" if rotary else "learned",
        activation=_activation(args),
        bias=bias,
        qkv_bias=bool(args.get("add_qkv_bias")) and not bias,
        qk_norm=bool(args.get("qk_layernorm")),
        tied=not args.get("untie_embeddings_and_output_weights", False),
        norm_eps=args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5,
        rope_base=number(base, "rotary_base", place),
    )


_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size")
_NEEDS: Mapping[str, Any] = {
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_query_key_layer_scaling": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "mtp_num_layers": None,
}


def _activation(args: Mapping[str, Any]) -> Any:
    if args.get("swiglu"):
        return "swiglu"
    if args.get("squared_relu"):
        return "squared_relu"
    # bias_gelu_fusion, which Megatron has on, is the tanh form.
    return "gelu_tanh" if args.get("bias_gelu_fusion") else "gelu"


def to_args(cfg: GPTConfig, *, tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
    """Return Megatron's arguments for a model; the inverse of `to_gpt_config`.

    Raises:
        ValueError: it has no such model.
    """
    odd = {"window": None, "rope_scaling": None}
    for name, wanted in odd.items():
        if getattr(cfg, name) != wanted:
            raise ValueError(
                f"GPTConfig: {name} is {getattr(cfg, name)!r}, which a checkpoint of Megatron "
                "does not say. Keep it in another format, for example hf."
            )
    rotary = cfg.positions == "rotary"
    return {
        "num_layers": cfg.num_layers,
        "hidden_size": cfg.embed,
        "ffn_hidden_size": cfg.ffn,
        "num_attention_heads": cfg.num_heads,
        "num_query_groups": cfg.kv_heads,
        "group_query_attention": cfg.group > 1,
        "kv_channels": cfg.head_dim,
        "seq_length": cfg.seq_length,
        "max_position_embeddings": cfg.seq_length,
        "position_embedding_type": "rope" if rotary else "learned_absolute",
        "add_position_embedding": not rotary,
        "use_rotary_position_embeddings": rotary,
        "rotary_base": cfg.rope_base,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm" if cfg.norm == "rms" else "LayerNorm",
        "norm_epsilon": cfg.norm_eps,
        "swiglu": cfg.activation == "swiglu",
        "squared_relu": cfg.activation == "squared_relu",
        "bias_gelu_fusion": cfg.activation == "gelu_tanh",
        "add_bias_linear": cfg.bias,
        "add_qkv_bias": cfg.qkv_bias,
        "qk_layernorm": cfg.qk_norm,
        "untie_embeddings_and_output_weights": not cfg.tied,
        "vocab_size": cfg.vocab_size,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "transformer_impl": "local",
    }
