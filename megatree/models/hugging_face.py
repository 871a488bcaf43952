"""Families of Hugging Face: for each the names of leaves and the keys of config.json, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from megatree.models.gpt_config import GPTConfig
from megatree.models.moe_config import MoEConfig
from megatree.models.moe_names import DEEPSEEK_V3, DIRECT_QUERIES, MIXTRAL, QWEN3_MOE
from megatree.models.names import GPT2, LLAMA, Source
from megatree.models.stated import number


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model as Hugging Face keeps it.

    Args:
        architecture: name of the class, "LlamaForCausalLM".
        model_type: "llama".
        sources: names and layouts of the leaves.
        keys: key of config.json -> field of the config, or several that are all that value.
        read: function of (config.json, place) to the fields that `keys` do not say.
        write: its inverse, of a config.
        said: names of those fields.
        config: what configs are.
        fields: fields that all of the family have.
        needs: key of config.json -> the one value of it that we compute; absent is that value.
        ignores: further keys that change no logits, or that `read` looks at.
        aliases: another name of a key -> the key.
    """

    architecture: str
    model_type: str
    sources: tuple[Source, ...]
    keys: Mapping[str, str]
    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    said: tuple[str, ...]
    config: type[GPTConfig] = GPTConfig
    fields: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


_ACTIVATIONS = MappingProxyType(
    {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
)


def _read_gpt2(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    heads, embed = config["n_head"], config["n_embd"]
    spelled = config.get("activation_function", "gelu_new")
    if spelled not in _ACTIVATIONS:
        raise ValueError(
            f"{place}: activation_function is {spelled!r}. Known are {', '.join(_ACTIVATIONS)}."
        )
    out = {"kv_heads": heads, "head_dim": embed // heads, "activation": _ACTIVATIONS[spelled]}
    return {"ffn": 4 * embed, "tied": True, **out}


def _write_gpt2(cfg: GPTConfig) -> dict[str, Any]:
    if cfg.activation not in _ACTIVATIONS.values() or cfg.head_dim * cfg.kv_heads != cfg.embed:
        raise ValueError(
            f"GPTConfig: GPT2LMHeadModel has no model with activation={cfg.activation!r}, or with "
            f"{cfg.kv_heads} heads of {cfg.head_dim} in {cfg.embed}. Keep it in another format, "
            "for example dcp or orbax."
        )
    spelled = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[cfg.activation]
    return {"n_head": cfg.num_heads, "activation_function": spelled, "embd_pdrop": cfg.dropout}


def _read_llama(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"{place}: {heads} heads do not divide over {kv_heads} key heads.")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    out = {"kv_heads": kv_heads, "group": heads // kv_heads, "head_dim": head_dim}
    base, kind, told = _rope(config, place)
    if kind == "default":
        return {**out, "rope_base": base}
    if kind != "llama3":
        raise ValueError(
            f"{place}: rope_type is {kind!r}, and only 'default' and 'llama3' are computed here. "
            "Convert a model with one of them."
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = tuple(number(told, name, place) for name in names)
    return {**out, "rope_base": base, "rope_scaling": scaling}


def _rope(config: Mapping[str, Any], place: str) -> tuple[float, str, dict[str, Any]]:
    """Return base, kind and what else is said, as files of transformers 4 and 5 have them."""
    told: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(value := config.get(key) or {}, Mapping):
            raise ValueError(f"{place}: {key} is {value!r}, no object. Copy it anew.")
        told |= value
    base = number(told if "rope_theta" in told else config, "rope_theta", place, 10000.0)
    return base, told.get("rope_type", told.get("type", "default")), told


def _write_llama(cfg: GPTConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_base}
    if cfg.rope_scaling is not None:
        factor, low, high, length = cfg.rope_scaling
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
        rope |= {"high_freq_factor": high, "original_max_position_embeddings": int(length)}
    out = {"num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.kv_heads}
    # Readers of before transformers 5 look for the base on top, later ones in rope_parameters.
    return out | {"head_dim": cfg.head_dim, "rope_parameters": rope, "rope_theta": cfg.rope_base}


_LLAMA_SAID = ("kv_heads", "group", "head_dim", "rope_base", "rope_scaling")
_LLAMA: dict[str, Any] = {"read": _read_llama, "write": _write_llama, "said": _LLAMA_SAID}
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
    **_LLAMA,
    sources=LLAMA,
    keys=_LLAMA_KEYS,
    needs={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
)
MISTRAL_FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    **_LLAMA,
    sources=LLAMA,
    keys={**_LLAMA_KEYS, "sliding_window": "window"},
    needs={"hidden_act": "silu"},
)
QWEN2_FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    **_LLAMA,
    sources=(*LLAMA, *_biases()),
    keys=_LLAMA_KEYS,
    fields={"qkv_bias": True},
    needs={"hidden_act": "silu", "use_sliding_window": False},
)
QWEN3_FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    **_LLAMA,
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
    read=_read_gpt2,
    write=_write_gpt2,
    said=("kv_heads", "head_dim", "activation"),
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

_DEPTHS = 4


def _read_qwen3_moe(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    every = config.get("decoder_sparse_step", 1)
    normalised = config.get("norm_topk_prob", False)
    # A softmax over the chosen logits is one over all of them, divided by the sum of the chosen.
    choice = {"pre_softmax": not normalised, "dense_first": every - 1 or None, "every": every}
    return {**_read_llama(config, place), **choice}


def _write_qwen3_moe(cfg: MoEConfig) -> dict[str, Any]:
    if (cfg.dense_first or 0) != cfg.every - 1:
        raise ValueError(
            f"MoEConfig: dense_first is {cfg.dense_first} with every {cfg.every}, and of "
            "Qwen3MoeForCausalLM the first mixture is layer every - 1. Keep it in another format, "
            "for example dcp or orbax."
        )
    normalised = not cfg.pre_softmax or bool(cfg.normalise)
    return {**_write_llama(cfg), "norm_topk_prob": normalised, "decoder_sparse_step": cfg.every}


def _read_deepseek_v3(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    if (kv_heads := config.get("num_key_value_heads") or heads) != heads:
        raise ValueError(f"{place}: {kv_heads} key heads for {heads} heads. Give as many of both.")
    shared = config.get("n_shared_experts") or 0
    out: dict[str, Any] = {"kv_heads": heads, "mtp": config.get("num_nextn_predict_layers") or None}
    out["shared_ffn"] = config["moe_intermediate_size"] * shared if shared else None
    groups, kept = config.get("n_group") or 1, config.get("topk_group") or 1
    if groups > 1:
        if config["num_experts_per_tok"] != 2 * kept:
            raise ValueError(
                f"{place}: num_experts_per_tok is {config['num_experts_per_tok']} with topk_group "
                f"{kept}. They judge a group by its best two experts, we by as many as a token "
                f"takes of it: convert a model with num_experts_per_tok {2 * kept}."
            )
        out |= {"groups": groups, "group_top_k": kept}
    base, kind, told = _rope(config, place)
    out["rope_base"] = base
    if kind == "yarn":
        scale, of_all = told.get("mscale"), told.get("mscale_all_dim")
        odd = [name for name in ("attention_factor", "truncate") if told.get(name) is not None]
        if odd or (of_all and not scale):
            raise ValueError(
                f"{place}: rope_scaling has {', '.join(odd) or 'mscale_all_dim without mscale'}, "
                "which is not computed here. Convert a model without it."
            )
        both = (1.0, 0.0)
        if scale and of_all:
            both = (number(told, "mscale", place), number(told, "mscale_all_dim", place))
        names = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
        told = {"beta_fast": 32, "beta_slow": 1} | {k: v for k, v in told.items() if v}
        out["yarn"] = (*(number(told, x, place) for x in names), *both)
    elif kind != "default":
        raise ValueError(
            f"{place}: rope_type is {kind!r}, and only 'default' and 'yarn' are computed here. "
            "Convert a model with one of them."
        )
    return out


def _write_deepseek_v3(cfg: MoEConfig) -> dict[str, Any]:
    wrong = ""
    if cfg.bias_rate is None:
        wrong = "bias_rate=None, and its routers have a bias"
    elif cfg.groups and cfg.top_k != 2 * (cfg.group_top_k or 0):
        wrong = f"top_k {cfg.top_k} of {cfg.group_top_k} groups: it takes two experts of a group"
    elif cfg.shared_ffn is None or cfg.shared_ffn % cfg.expert_ffn:
        wrong = f"shared_ffn {cfg.shared_ffn}: it is a multiple of expert_ffn, {cfg.expert_ffn}"
    elif (cfg.mtp or 0) > _DEPTHS:
        wrong = f"mtp {cfg.mtp}: names are known for {_DEPTHS}"
    elif cfg.yarn and cfg.yarn[4:] != (1.0, 0.0) and 0.0 in cfg.yarn[4:]:
        wrong = f"yarn {cfg.yarn}: it has both of the last two, or (1, 0)"
    if wrong:
        raise ValueError(
            f"MoEConfig: DeepseekV3ForCausalLM has no model with {wrong}. Keep it in another "
            "format, for example dcp or orbax."
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_base}
    if cfg.yarn is not None:
        factor, fast, slow, length, scale, of_all = cfg.yarn
        rope |= {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow}
        rope["original_max_position_embeddings"] = int(length)
        rope |= {"mscale": scale, "mscale_all_dim": of_all} if of_all else {}
    return {
        "num_attention_heads": cfg.kv_heads,
        "num_key_value_heads": cfg.kv_heads,
        "n_shared_experts": (cfg.shared_ffn or 0) // cfg.expert_ffn,
        "n_group": cfg.groups or 1,
        "topk_group": cfg.group_top_k or 1,
        "first_k_dense_replace": cfg.dense_first or 0,
        "norm_topk_prob": cfg.top_k > 1 if cfg.normalise is None else cfg.normalise,
        "num_nextn_predict_layers": cfg.mtp or 0,
        "rope_parameters": rope,
        "rope_theta": cfg.rope_base,
    }


_MOE_IGNORES = ("router_aux_loss_coef", "output_router_logits")
MIXTRAL_FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    **_LLAMA,
    config=MoEConfig,
    sources=MIXTRAL,
    keys={
        **_LLAMA_KEYS,
        "intermediate_size": "expert_ffn ffn",
        "sliding_window": "window",
        "num_local_experts": "experts",
        "num_experts_per_tok": "top_k",
    },
    needs={"hidden_act": "silu"},
    ignores=(*_MOE_IGNORES, "router_jitter_noise"),
    aliases={"num_experts": "num_local_experts"},
)
QWEN3_MOE_FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    config=MoEConfig,
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    said=(*_LLAMA_SAID, "pre_softmax", "normalise", "dense_first", "every"),
    sources=QWEN3_MOE,
    keys={
        **_LLAMA_KEYS,
        "moe_intermediate_size": "expert_ffn",
        "num_experts": "experts",
        "num_experts_per_tok": "top_k",
    },
    fields={"qk_norm": True},
    needs={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "mlp_only_layers": [],
    },
    ignores=(*_MOE_IGNORES, "norm_topk_prob", "decoder_sparse_step"),
    aliases={"num_local_experts": "num_experts"},
)
DEEPSEEK_V3_FAMILY = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    config=MoEConfig,
    read=_read_deepseek_v3,
    write=_write_deepseek_v3,
    said=("kv_heads", "mtp", "shared_ffn", "groups", "group_top_k", "rope_base", "yarn"),
    sources=DEEPSEEK_V3,
    keys={
        **_LLAMA_KEYS,
        "q_lora_rank": "q_rank",
        "kv_lora_rank": "kv_rank",
        "qk_nope_head_dim": "head_dim",
        "qk_rope_head_dim": "rope_dim",
        "v_head_dim": "value_dim",
        "moe_intermediate_size": "expert_ffn",
        "n_routed_experts": "experts",
        "num_experts_per_tok": "top_k",
        "first_k_dense_replace": "dense_first",
        "routed_scaling_factor": "route_scale",
        "norm_topk_prob": "normalise",
    },
    fields={"score": "sigmoid", "bias_rate": 1e-3},
    needs={
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "pretraining_tp": 1,
        "ep_size": 1,
        "quantization_config": None,
    },
    ignores=(
        *_MOE_IGNORES, "aux_loss_alpha", "seq_aux", "auto_map", "n_shared_experts", "n_group",
        "topk_group", "num_nextn_predict_layers", "qk_head_dim",
    ),
    aliases={"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"},
)  # fmt: skip
FAMILIES = (
    LLAMA_FAMILY,
    MISTRAL_FAMILY,
    QWEN2_FAMILY,
    QWEN3_FAMILY,
    GPT2_FAMILY,
    MIXTRAL_FAMILY,
    QWEN3_MOE_FAMILY,
    DEEPSEEK_V3_FAMILY,
)

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
# Fields that change no logits: of training, and of how things are computed.
_FREE = frozenset((
    "vocab_pad", "init_std", "dropout", "attention_dropout", "fused_loss", "mtp_weight", "balance",
    "balance_over", "bias_rate", "z_loss", "jitter", "router", "capacity_factor",
    "pad_to_capacity", "products", "overlap_shared",
))  # fmt: skip


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
    if isinstance(cfg, MoEConfig):
        kind = "qwen3_moe" if cfg.qk_norm else "mixtral" if cfg.kv_rank is None else "deepseek_v3"
    elif kind == "llama" and cfg.qk_norm:
        kind = "qwen3"
    elif kind == "llama" and cfg.qkv_bias:
        kind = "qwen2"
    elif kind == "llama" and cfg.window is not None:
        kind = "mistral"
    (family,) = (family for family in FAMILIES if family.model_type == kind)
    default = {f.name: f.default for f in fields(family.config)} | dict(family.fields)
    free = {*" ".join(family.keys.values()).split(), *family.said, *_FREE}
    odd = [name for name, value in default.items()
           if name not in free and getattr(cfg, name) != value]  # fmt: skip
    if odd:
        raise ValueError(
            f"{type(cfg).__name__}: {family.architecture} has no model with "
            f"{', '.join(f'{name}={getattr(cfg, name)!r}' for name in odd)}. "
            "Keep it in another format, for example dcp or orbax."
        )
    return family


def sources_for(family: Family, cfg: GPTConfig) -> tuple[Source, ...]:
    """Return the names and layouts of the leaves of a model."""
    if cfg.kv_rank is not None and cfg.q_rank is None:
        return *family.sources, *DIRECT_QUERIES  # later rows hold
    return family.sources


def copies_in(cfg: GPTConfig) -> dict[str, str]:
    """Return the tensors that files hold once more: name of the copy -> name.

    What predicts further tokens has the tables of the embedding and of the head.
    """
    head = "model.embed_tokens.weight" if cfg.tied else "lm_head.weight"
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": head}
    return {
        f"model.layers.{cfg.num_layers + depth}.{copy}.weight": name
        for depth in range(cfg.mtp or 0)
        for copy, name in copies.items()
    }


def to_gpt_config(config: Mapping[str, Any], place: str) -> GPTConfig:
    """Return the sizes and choices that a config.json states.

    Raises:
        ValueError: it asks for what we do not compute, or has a key that we do not know.
    """
    family = family_of(config, place)
    config = {family.aliases.get(key, key): value for key, value in config.items()}
    _refuse_unknown(config, family, place)
    values: dict[str, Any] = {**family.fields, **family.read(config, place)}
    for key, names in family.keys.items():
        if config.get(key) is not None:
            values |= dict.fromkeys(names.split(), config[key])
    return family.config(**values)


def _refuse_unknown(config: Mapping[str, Any], family: Family, place: str) -> None:
    known = {*family.keys, *family.needs, *family.ignores, *_IGNORED}
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


def to_hf_config(cfg: GPTConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model; the inverse of `to_gpt_config`.

    Raises:
        ValueError: no family can hold it.
    """
    family = family_for(cfg)
    out: dict[str, Any] = {"architectures": [family.architecture], "dtype": dtype}
    out |= {key: getattr(cfg, names.split()[0]) for key, names in family.keys.items()}
    return out | {**family.needs, "model_type": family.model_type, **family.write(cfg)}
