"""Names and layouts that the files of Hugging Face give the leaves of `moe`, as data.

In files every expert has tensors of its own, and Mixtral's have names of their own.
"""

from megatree.models.names import LLAMA, Source

_LAYER, _EXPERT = "model.layers.{layer}", "experts.{expert}"
_DENSE = ("w_gate", "w_up", "w_down")


def _of(unit: str, rows: tuple[tuple[str, str, str], ...]) -> tuple[Source, ...]:
    return tuple(
        Source(leaf=f"{unit}.{leaf}", name=f"{_LAYER}.{name}.weight", axes=axes)
        for leaf, name, axes in rows
    )


def _experts(unit: str, place: str, parts: tuple[str, str, str]) -> tuple[Source, ...]:
    """Return the rows of a router and its experts, whose gate, up and down are called so."""
    gate, up, down = (f"{place}.{_EXPERT}.{part}" for part in parts)
    return _of(
        unit,
        (
            ("router", f"{place}.gate", "choices embed"),
            ("w_gate", gate, "expert_ffn embed"),
            ("w_up", up, "expert_ffn embed"),
            ("w_down", down, "embed expert_ffn"),
        ),
    )


def _norms(unit: str) -> tuple[Source, ...]:
    rows = [(f"norm_{x}", f"self_attn.{x}_norm", "head_dim") for x in ("q", "k")]
    return _of(unit, tuple(rows))


_ENDS = tuple(source for source in LLAMA if not source.layered)
_ATTENTION = tuple(
    Source(leaf=s.leaf.replace(".dense.", ".moe."), name=s.name, axes=s.axes)
    for s in LLAMA
    if s.layered and s.leaf.split(".")[-1] not in _DENSE
)
_PARTS = ("gate_proj", "up_proj", "down_proj")

MIXTRAL = (
    *_ENDS,
    *_ATTENTION,
    *_experts("blocks.moe", "block_sparse_moe", ("w1", "w3", "w2")),
)
"""`MixtralForCausalLM`."""

QWEN3_MOE = (
    *LLAMA,
    *_norms("blocks.dense"),
    *_ATTENTION,
    *_norms("blocks.moe"),
    *_experts("blocks.moe", "mlp", _PARTS),
)
"""`Qwen3MoeForCausalLM`."""


def _latent(unit: str) -> tuple[Source, ...]:
    """Return the rows of latent attention and of the norms of a layer."""
    whole = _of(
        unit,
        (
            ("norm1", "input_layernorm", "embed"),
            ("norm2", "post_attention_layernorm", "embed"),
            ("wq_down", "self_attn.q_a_proj", "q_rank embed"),
            ("norm_q", "self_attn.q_a_layernorm", "q_rank"),
            ("wq", "self_attn.q_b_proj", "(kv_heads group query_dim) q_rank"),
            ("norm_kv", "self_attn.kv_a_layernorm", "kv_rank"),
            ("wo", "self_attn.o_proj", "embed (kv_heads group value_dim)"),
        ),
    )
    down, up = "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"
    made, stacked = "part:kv_rank+rope_dim embed", "(kv_heads part:head_dim+value_dim) kv_rank"
    parts = tuple(
        Source(leaf=f"{unit}.{leaf}", name=f"{_LAYER}.{name}.weight", axes=axes, at=("part", at))
        for leaf, name, axes, at in (
            ("wkv_down", down, made, 0),
            ("wk_rope", down, made, "kv_rank"),
            ("wk", up, stacked, 0),
            ("wv", up, stacked, "head_dim"),
        )
    )
    return *whole, *parts


def _mixture(unit: str) -> tuple[Source, ...]:
    """Return the rows of a router with a bias, of its experts and of the shared one."""
    shared = "mlp.shared_experts"
    bias = f"{_LAYER}.mlp.gate.e_score_correction_bias"
    return (
        *_experts(unit, "mlp", _PARTS),
        Source(leaf=f"{unit}.router_bias", name=bias, axes="choices"),
        *_of(
            unit,
            (
                ("shared_gate", f"{shared}.gate_proj", "shared_ffn embed"),
                ("shared_up", f"{shared}.up_proj", "shared_ffn embed"),
                ("shared_down", f"{shared}.down_proj", "embed shared_ffn"),
            ),
        ),
    )


def _ahead(unit: str) -> tuple[Source, ...]:
    """Return the rows of what predicts a further token, beside those of its layer."""
    joined = "mtp_embed (part:2 embed)"
    return (
        *_of(
            unit,
            (
                ("norm_token", "enorm", "embed"),
                ("norm_hidden", "hnorm", "embed"),
                ("norm_out", "shared_head.norm", "embed"),
            ),
        ),
        *(
            Source(
                leaf=f"{unit}.{leaf}", name=f"{_LAYER}.eh_proj.weight", axes=joined, at=("part", at)
            )
            for at, leaf in enumerate(("w_token", "w_hidden"))
        ),
    )


_DEPTHS = tuple(f"mtp.depth{depth}" for depth in range(1, 5))

DEEPSEEK_V3 = (
    *_ENDS,
    *(s for s in LLAMA if s.layered and s.leaf.split(".")[-1] in _DENSE),
    *_latent("blocks.dense"),
    *(
        row
        for unit in ("blocks.moe", *_DEPTHS)
        for row in (*_latent(unit), *_mixture(unit), *(_ahead(unit) if unit in _DEPTHS else ()))
    ),
)
"""`DeepseekV3ForCausalLM`, and the layers behind it that its class does not load."""

DIRECT_QUERIES = tuple(
    Source(
        leaf=f"{unit}.wq",
        name=f"{_LAYER}.self_attn.q_proj.weight",
        axes="(kv_heads group query_dim) embed",
    )
    for unit in ("blocks.dense", "blocks.moe", *_DEPTHS)
)
"""What queries are made of in a model of `DEEPSEEK_V3` without q_rank."""
