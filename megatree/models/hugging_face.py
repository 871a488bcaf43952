"""Families of Hugging Face: for each the names of leaves and the keys of config.json, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from megatree.models.gpt_config import GPTConfig
from megatree.models.names import GPT2, LLAMA, Source


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model as Hugging Face keeps it.

    Args:
        architecture: name of the class, "LlamaForCausalLM".
        model_type: "llama".
        sources: names and layouts of the leaves.
        keys: key of config.json -> field of GPTConfig.
        fields: fields of GPTConfig that all of the family have.
        needs: key of config.json -> the one value of it that we compute; absent is that value.
        writes: further keys of config.json that a folder of ours has.
    """

    architecture: str
    model_type: str
    sources: tuple[Source, ...]
    keys: Mapping[str, str]
    fields: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    writes: Mapping[str, Any] = field(default_factory=dict)


_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed",
    "intermediate_size": "ffn",
    "tie_word_embeddings": "tied",
    "attention_dropout": "attention_dropout",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}
_LAYER = "model.layers.{layer}.self_attn"


def _biases() -> tuple[Source, ...]:
    shapes = {"q": "(kv_heads group head_dim)", "k": "(kv_heads head_dim)"}
    shapes["v"] = shapes["k"]
    return tuple(
        Source(leaf=f"blocks.dense.b{x}", name=f"{_LAYER}.{x}_proj.bias", axes=axes)
        for x, axes in shapes.items()
    )


LLAMA_FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    sources=LLAMA,
    keys=_LLAMA_KEYS,
    needs={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
)
MISTRAL_FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    sources=LLAMA,
    keys={**_LLAMA_KEYS, "sliding_window": "window"},
    needs={"hidden_act": "silu"},
)
QWEN2_FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    sources=(*LLAMA, *_biases()),
    keys=_LLAMA_KEYS,
    fields={"qkv_bias": True},
    needs={"hidden_act": "silu", "use_sliding_window": False},
)
QWEN3_FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    sources=(
        *LLAMA,
        Source(leaf="blocks.dense.norm_q", name=f"{_LAYER}.q_norm.weight", axes="head_dim"),
        Source(leaf="blocks.dense.norm_k", name=f"{_LAYER}.k_norm.weight", axes="head_dim"),
    ),
    keys=_LLAMA_KEYS,
    fields={"qk_norm": True},
    needs={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)
GPT2_FAMILY = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    sources=GPT2,
    keys={
        "vocab_size": "vocab_size",
        "n_positions": "seq_length",
        "n_layer": "num_layers",
        "n_embd": "embed",
        "n_inner": "ffn",
        "tie_word_embeddings": "tied",
        "resid_pdrop": "dropout",
        "attn_pdrop": "attention_dropout",
        "layer_norm_epsilon": "norm_eps",
        "initializer_range": "init_std",
    },
    fields={"norm": "layer", "positions": "learned", "bias": True},
    needs={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
)
FAMILIES = (LLAMA_FAMILY, MISTRAL_FAMILY, QWEN2_FAMILY, QWEN3_FAMILY, GPT2_FAMILY)

# Keys that change no logits of ours, or that are read by name below.
_IGNORED = frozenset((
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "sep_token_id", "decoder_start_token_id", "_name_or_path", "_attn_implementation",
    "n_ctx", "embd_pdrop", "summary_type", "summary_use_proj", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "task_specific_params",
    "reorder_and_upcast_attn", "num_attention_heads", "num_key_value_heads", "head_dim",
    "n_head", "rope_theta", "rope_scaling", "rope_parameters", "activation_function",
    "max_window_layers", "sliding_window", "layer_types", "output_past",
    "gradient_checkpointing", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "id2label", "label2id",
    "problem_type", "rope_interleaved",
))  # fmt: skip
_ACTIVATIONS = MappingProxyType(
    {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
)


def family_of(config: Mapping[str, Any], place: str) -> Family:
    """Return the family of a config.json.

    Raises:
        ValueError: it is none of ours.
    """
    for family in FAMILIES:
        if config.get("model_type") == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"{place}: model_type is {config.get('model_type')!r}. Known are {known}.")


def family_for(cfg: GPTConfig) -> Family:
    """Return the family that can hold a model.

    Raises:
        ValueError: none can.
    """
    kind = "gpt2" if cfg.positions == "learned" else "llama"
    if kind == "llama" and cfg.qk_norm:
        kind = "qwen3"
    elif kind == "llama" and cfg.qkv_bias:
        kind = "qwen2"
    elif kind == "llama" and cfg.window is not None:
        kind = "mistral"
    (family,) = (family for family in FAMILIES if family.model_type == kind)
    odd = [name for name, (got, wanted) in _contradictions(cfg, family).items() if got != wanted]
    if odd:
        raise ValueError(
            f"GPTConfig: {family.architecture} has no model with "
            f"{', '.join(f'{name}={getattr(cfg, name)!r}' for name in odd)}. "
            "Keep it in another format, for example dcp or orbax."
        )
    return family


def _contradictions(cfg: GPTConfig, family: Family) -> dict[str, tuple[Any, Any]]:
    """Return the fields that the family fixes, with the value here and there."""
    default = {f.name: f.default for f in fields(GPTConfig)}
    free = {*family.keys.values(), "kv_heads", "group", "head_dim", "vocab_pad", "init_std"}
    free |= {"dropout", "attention_dropout"}
    free |= {"activation"} if family is GPT2_FAMILY else {"rope_base", "rope_scaling"}
    wanted = {**default, **family.fields}
    if family is GPT2_FAMILY:
        wanted |= {"group": 1, "rope_base": cfg.rope_base, "head_dim": cfg.embed // cfg.kv_heads}
        free -= {"group", "head_dim"}
        if cfg.activation not in _ACTIVATIONS.values():
            wanted, free = {**wanted, "activation": "gelu_tanh"}, free - {"activation"}
    return {name: (getattr(cfg, name), wanted[name]) for name in wanted if name not in free}


def to_gpt_config(config: Mapping[str, Any], place: str) -> GPTConfig:
    """Return the sizes and choices that a config.json states.

    Raises:
        ValueError: it asks for what we do not compute, or has a key that we do not know.
    """
    family = family_of(config, place)
    _refuse_unknown(config, family, place)
    values: dict[str, Any] = dict(family.fields)
    values |= {f: config[key] for key, f in family.keys.items() if config.get(key) is not None}
    if family is GPT2_FAMILY:
        heads = config["n_head"]
        values |= {"kv_heads": heads, "head_dim": values["embed"] // heads}
        values.setdefault("ffn", 4 * values["embed"])
        values.setdefault("tied", True)
        spelled = config.get("activation_function", "gelu_new")
        if spelled not in _ACTIVATIONS:
            raise ValueError(
                f"{place}: activation_function is {spelled!r}. Known are {', '.join(_ACTIVATIONS)}."
            )
        values["activation"] = _ACTIVATIONS[spelled]
    else:
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(f"{place}: {heads} heads do not divide over {kv_heads} key heads.")
        values |= {"kv_heads": kv_heads, "group": heads // kv_heads}
        values["head_dim"] = config.get("head_dim") or values["embed"] // heads
        values |= _read_rope(config, place)
    return GPTConfig(**values)


def _refuse_unknown(config: Mapping[str, Any], family: Family, place: str) -> None:
    known = {*family.keys, *family.needs, *_IGNORED}
    for key, value in config.items():
        if key in family.needs and value != family.needs[key] and value is not None:
            raise ValueError(
                f"{place}: {key} is {value!r}, and only {family.needs[key]!r} is computed here. "
                "Convert a model without it."
            )
        if key not in known and value not in (None, False, [], {}):
            raise ValueError(
                f"{place}: {key} is {value!r}, a key that {family.architecture} is not known to "
                "have here. Take it out if it changes no logits."
            )
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds and not (kinds == {"sliding_attention"} and family is MISTRAL_FAMILY):
        raise ValueError(
            f"{place}: layer_types has {', '.join(sorted(kinds))}, and layers are alike here. "
            "Convert a model whose layers are alike."
        )


def _read_rope(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return rope_base and rope_scaling, as files of transformers 4 and 5 have them."""
    told = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = told.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = told.get("rope_type", told.get("type", "default"))
    if kind == "default":
        return {"rope_base": float(base)}
    if kind != "llama3":
        raise ValueError(
            f"{place}: rope_type is {kind!r}, and only 'default' and 'llama3' are computed here. "
            "Convert a model with one of them."
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = tuple(float(told[name]) for name in names)
    return {"rope_base": float(base), "rope_scaling": scaling}


def to_hf_config(cfg: GPTConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model; the inverse of `to_gpt_config`.

    Raises:
        ValueError: no family can hold it.
    """
    family = family_for(cfg)
    out: dict[str, Any] = {"architectures": [family.architecture], "dtype": dtype}
    out |= {key: getattr(cfg, name) for key, name in family.keys.items()}
    out |= {**family.needs, "model_type": family.model_type}
    if family is GPT2_FAMILY:
        spelled = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[cfg.activation]
        out |= {"n_head": cfg.num_heads, "activation_function": spelled}
        out["embd_pdrop"] = cfg.dropout
        return out
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_base}
    if cfg.rope_scaling is not None:
        factor, low, high, length = cfg.rope_scaling
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
        rope |= {"high_freq_factor": high, "original_max_position_embeddings": int(length)}
    out |= {"num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.kv_heads}
    # Readers of before transformers 5 look for the base on top, later ones in rope_parameters.
    return out | {"head_dim": cfg.head_dim, "rope_parameters": rope, "rope_theta": cfg.rope_base}
