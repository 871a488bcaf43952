"""The central table: models, and the meshes and rules under which each must be itself."""

from typing import Any

from megatree.models.gpt import GPTConfig
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh

_SIZES: dict[str, Any] = {"seq_length": 8, "num_layers": 2, "embed": 16, "head_dim": 4, "ffn": 16}
# 50 tokens divide over nothing; the table is padded to 56 rows, which divide over 2, 4 and 8.
_VOCAB: dict[str, Any] = {"vocab_size": 50, "vocab_pad": 8}
_LLAMA: dict[str, Any] = {"norm": "rms", "positions": "rotary", "activation": "swiglu"}
_GPT2: dict[str, Any] = {
    "norm": "layer",
    "positions": "learned",
    "activation": "gelu_tanh",
    "bias": True,
}

MODELS: dict[str, GPTConfig] = {
    # four key heads of two query heads: two key heads a rank under tp=2
    "llama": GPTConfig(**_SIZES, **_VOCAB, **_LLAMA, kv_heads=4, group=2),
    "llama tied": GPTConfig(**_SIZES, **_VOCAB, **_LLAMA, kv_heads=4, group=2, tied=True),
    "gpt2 tied": GPTConfig(**_SIZES, **_VOCAB, **_GPT2, kv_heads=4, tied=True),
    "gpt2 dropout": GPTConfig(
        **_SIZES, **_VOCAB, **_GPT2, kv_heads=4, dropout=0.2, attention_dropout=0.3
    ),
    "squared relu": GPTConfig(
        **_SIZES,
        vocab_size=56,
        norm="layer",
        positions="rotary",
        activation="squared_relu",
        bias=True,
        kv_heads=4,
        group=1,
    ),
    # one key head: query heads are cut by their position in the group
    "mqa": GPTConfig(**_SIZES, **_VOCAB, **_LLAMA, kv_heads=1, group=8, dropout=0.1),
    # two key heads, on four ranks
    "few kv": GPTConfig(**_SIZES, **_VOCAB, **_GPT2, kv_heads=2, group=4, tied=True),
}

Axes = str | tuple[str, ...]


def _tp(mesh: Mesh, axes: Axes = "tp", *, heads: str = "kv_heads", **more: Axes | None) -> Layout:
    """Cut heads, feed-forward and vocabulary over the same mesh axes."""
    return Layout(mesh, Rules(**{heads: axes, "ffn": axes, "vocab": axes, **more}))


def _rows(heads: str) -> dict[str, Layout]:
    """Return the layouts of a model whose query heads are cut by the logical axis `heads`."""

    def tp(mesh: Mesh, axes: Axes = "tp", **more: Axes | None) -> Layout:
        return _tp(mesh, axes, heads=heads, **more)

    return {
        "one rank": Layout(),
        "dp2": Layout(Mesh(dp=2), Rules(batch="dp")),
        "dp8": Layout(Mesh(dp=8), Rules(batch="dp")),
        "tp2": tp(Mesh(tp=2)),
        "tp4": tp(Mesh(tp=4)),
        "tp2 sp": tp(Mesh(tp=2), seq_res="tp"),
        "tp4 sp": tp(Mesh(tp=4), seq_res="tp"),
        "dp2 tp2": tp(Mesh(dp=2, tp=2), batch="dp"),
        "dp2 tp2 sp": tp(Mesh(dp=2, tp=2), batch="dp", seq_res="tp"),
        "dp2 tp4 sp": tp(Mesh(dp=2, tp=4), batch="dp", seq_res="tp"),
        "dp4 tp2 sp": tp(Mesh(dp=4, tp=2), batch="dp", seq_res="tp"),
        "two dp axes": tp(Mesh(dp=2, ep=2, tp=2), batch=("dp", "ep"), seq_res="tp"),
        # a dim cut by two mesh axes, in mesh order and against it
        "tp over two": tp(Mesh(x=2, y=2), ("x", "y"), seq_res=("x", "y")),
        "tp over two, swapped": tp(Mesh(x=2, y=2), ("y", "x"), seq_res=("y", "x")),
        "dp, tp over two, swapped": tp(
            Mesh(x=2, y=2, dp=2), ("y", "x"), batch="dp", seq_res=("x", "y")
        ),
        # tp outside, dp inside: ranks of a group are not neighbours
        "axes in another order": tp(Mesh(model=2, data=4), "model", batch="data", seq_res="model"),
        # the residual is cut further than the heads
        "sp over more": tp(Mesh(cp=2, tp=2), "tp", seq_res=("cp", "tp")),
        "sp over other": tp(Mesh(cp=2, tp=2), "tp", seq_res="cp"),
        # attention is cut one way, the feed-forward layer another, the vocabulary a third
        "mixed": Layout(
            Mesh(x=2, y=2, z=2),
            Rules(**{heads: "x", "ffn": "z", "vocab": "z", "batch": "y", "seq_res": "x"}),
        ),
        "attention alone": Layout(Mesh(tp=4), Rules(**{heads: "tp", "seq_res": "tp"})),
        "feed-forward alone": Layout(Mesh(tp=2), Rules(ffn="tp")),
        "vocabulary alone": Layout(Mesh(dp=2, tp=4), Rules(batch="dp", vocab="tp")),
        "positions too": tp(Mesh(tp=2), max_seq="tp", seq_res="tp"),
    }  # fmt: skip


def _few_kv() -> dict[str, Layout]:
    """Return layouts with more ranks than key heads: a part of tp cuts them, the rest the group."""
    mesh = Mesh(dp=2, tp=4).refine(kv=2)
    outer = Mesh(kv=2, heads=2, dp=2)
    rules = {"ffn": "tp", "vocab": "tp", "batch": "dp"}
    explicit = {"ffn": ("kv", "heads"), "vocab": ("kv", "heads"), "batch": "dp"}
    return {
        "refined": Layout(mesh, Rules(kv_heads="kv", group="tp/kv", **rules)),
        "refined sp": Layout(mesh, Rules(kv_heads="kv", group="tp/kv", seq_res="tp", **rules)),
        "refined, the other part": Layout(mesh, Rules(kv_heads="tp/kv", group="kv", **rules)),
        "explicit axes": Layout(outer, Rules(kv_heads="kv", group="heads", **explicit)),
        "explicit axes sp": Layout(
            outer, Rules(kv_heads="kv", group="heads", seq_res=("kv", "heads"), **explicit)
        ),
        "group alone": Layout(Mesh(tp=4), Rules(group="tp", ffn="tp", vocab="tp", seq_res="tp")),
        "tp2 sp": _tp(Mesh(tp=2), seq_res="tp"),
    }


def layouts(model: str) -> dict[str, Layout]:
    """Return name -> layout for every layout that a model of the table can have."""
    if model == "few kv":
        return _few_kv()
    rows = _rows("group" if model == "mqa" else "kv_heads")
    if MODELS[model].positions != "learned":
        del rows["positions too"]
    return rows


DEFAULT: dict[str, tuple[str, ...]] = {
    "llama": (
        "one rank", "dp2 tp2 sp", "dp2 tp4 sp", "mixed", "vocabulary alone",
    ),
    "llama tied": ("tp2", "dp8", "sp over more", "axes in another order"),
    "gpt2 tied": (
        "dp2 tp2", "tp4 sp", "positions too", "attention alone", "tp over two, swapped",
    ),
    "gpt2 dropout": ("dp2", "tp2 sp", "dp2 tp4 sp", "tp over two"),
    "squared relu": ("feed-forward alone", "tp4", "sp over other", "two dp axes"),
    "mqa": ("tp2", "dp4 tp2 sp", "dp, tp over two, swapped"),
    "few kv": tuple(_few_kv()),
}  # fmt: skip
"""The rows of the default run: every layout at least once; the full product runs in `-m full`."""


def rows() -> list[tuple[str, str, bool]]:
    """Return (model, layout, whether it is in the default run) of all rows."""
    return [(m, name, name in DEFAULT[m]) for m in MODELS for name in layouts(m)]
