"""The names and layouts that Hugging Face gives the leaves of `gpt`, as data."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatree.functional.chain import Chain, Segment, Stack
from megatree.functional.param import Param, logical_shape, padded_shape
from megatree.functional.tree import flatten_with_names


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the values of a leaf are found in another format.

    Args:
        leaf: path of the leaf, "blocks.dense.wq".
        name: name of the foreign tensor; "{layer}" stands for the layer's number.
        axes: the leaf's axes in the order in which the foreign tensor holds them, those that are
            one dim there in parentheses: "embed (kv_heads group head_dim)" is a matrix.
        part: (index, number) if the leaf is one of several equal parts of the foreign tensor's
            last dim.
    """

    leaf: str
    name: str
    axes: str
    part: tuple[int, int] = (0, 1)


_LLAMA_LAYER, _GPT2_LAYER = "model.layers.{layer}", "transformer.h.{layer}"

LLAMA = (
    Source(leaf="embed.table", name="model.embed_tokens.weight", axes="vocab embed"),
    *(
        Source(leaf=f"blocks.dense.{leaf}", name=f"{_LLAMA_LAYER}.{name}.weight", axes=axes)
        for leaf, name, axes in (
            ("norm1", "input_layernorm", "embed"),
            ("wq", "self_attn.q_proj", "(kv_heads group head_dim) embed"),
            ("wk", "self_attn.k_proj", "(kv_heads head_dim) embed"),
            ("wv", "self_attn.v_proj", "(kv_heads head_dim) embed"),
            ("wo", "self_attn.o_proj", "embed (kv_heads group head_dim)"),
            ("norm2", "post_attention_layernorm", "embed"),
            ("w_gate", "mlp.gate_proj", "ffn embed"),
            ("w_up", "mlp.up_proj", "ffn embed"),
            ("w_down", "mlp.down_proj", "embed ffn"),
        )
    ),
    Source(leaf="head.norm", name="model.norm.weight", axes="embed"),
    Source(leaf="head.table", name="lm_head.weight", axes="vocab embed"),
)
"""`LlamaForCausalLM`: GPTConfig(norm="rms", positions="rotary", activation="swiglu")."""

GPT2 = (
    Source(leaf="embed.table", name="transformer.wte.weight", axes="vocab embed"),
    Source(leaf="embed.positions", name="transformer.wpe.weight", axes="max_seq embed"),
    *(
        Source(leaf=f"blocks.dense.{leaf}", name=f"{_GPT2_LAYER}.{name}", axes=axes, part=part)
        for leaf, name, axes, part in (
            ("norm1", "ln_1.weight", "embed", (0, 1)),
            ("b_norm1", "ln_1.bias", "embed", (0, 1)),
            ("wq", "attn.c_attn.weight", "embed (kv_heads group head_dim)", (0, 3)),
            ("wk", "attn.c_attn.weight", "embed (kv_heads head_dim)", (1, 3)),
            ("wv", "attn.c_attn.weight", "embed (kv_heads head_dim)", (2, 3)),
            ("bq", "attn.c_attn.bias", "(kv_heads group head_dim)", (0, 3)),
            ("bk", "attn.c_attn.bias", "(kv_heads head_dim)", (1, 3)),
            ("bv", "attn.c_attn.bias", "(kv_heads head_dim)", (2, 3)),
            ("wo", "attn.c_proj.weight", "(kv_heads group head_dim) embed", (0, 1)),
            ("bo", "attn.c_proj.bias", "embed", (0, 1)),
            ("norm2", "ln_2.weight", "embed", (0, 1)),
            ("b_norm2", "ln_2.bias", "embed", (0, 1)),
            ("w_up", "mlp.c_fc.weight", "embed ffn", (0, 1)),
            ("b_up", "mlp.c_fc.bias", "ffn", (0, 1)),
            ("w_down", "mlp.c_proj.weight", "ffn embed", (0, 1)),
            ("b_down", "mlp.c_proj.bias", "embed", (0, 1)),
        )
    ),
    Source(leaf="head.norm", name="transformer.ln_f.weight", axes="embed"),
    Source(leaf="head.b_norm", name="transformer.ln_f.bias", axes="embed"),
    Source(leaf="head.table", name="lm_head.weight", axes="vocab embed"),
)
"""`GPT2LMHeadModel`: GPTConfig(norm="layer", positions="learned", activation="gelu_tanh",
bias=True, group=1)."""


def from_foreign(sources: Sequence[Source], tensors: Mapping[str, Tensor], model: Chain) -> Any:
    """Build the parameters of a model from the tensors of another format.

    Args:
        sources: LLAMA or GPT2.
        tensors: by foreign name; a tied head may or may not be among them.
        model: declares the leaves.

    Returns:
        A tree of whole tensors, as `model.params` declares them, padding zero.

    Raises:
        ValueError: a tensor is missing, left over or of another size.
    """
    names, leaves, spec = flatten_with_names(model.params)
    by_leaf = _sources_of(sources, names)
    wanted = {name for leaf in names for name in _foreign_names(by_leaf[leaf], model)}
    tied = {by_leaf[leaf].name for leaf in _borrowed(model) if leaf in by_leaf}
    _check_names(wanted, set(tensors) - (tied - wanted))
    values = []
    for path, leaf in zip(names, leaves, strict=True):
        source = by_leaf[path]
        parts = [
            _to_leaf(tensors[name], name, source, leaf, model)
            for name in _foreign_names(source, model)
        ]
        value = parts[0] if leaf.stack is None else torch.stack(parts)
        out = value.new_zeros(padded_shape(leaf, model.sizes, path))
        out[tuple(slice(0, n) for n in value.shape)] = value
        values.append(out)
    return spec.unflatten(values)


def to_foreign(sources: Sequence[Source], params: Any, model: Chain) -> dict[str, Tensor]:
    """Return the tensors of another format; the inverse of `from_foreign`.

    Args:
        sources: LLAMA or GPT2.
        params: a tree of whole tensors, as `model.params` declares them.
        model: declares the leaves.

    Returns:
        Tensors by foreign name.
    """
    names, leaves, spec = flatten_with_names(model.params)
    by_leaf = _sources_of(sources, names)
    found: dict[str, dict[int, Tensor]] = {}
    values: list[Any] = spec.flatten_up_to(params)
    for path, leaf, value in zip(names, leaves, values, strict=True):
        source = by_leaf[path]
        value = value[tuple(slice(0, n) for n in logical_shape(leaf, model.sizes, path))]
        for name, part in zip(
            _foreign_names(source, model), [value] if leaf.stack is None else value, strict=True
        ):
            found.setdefault(name, {})[source.part[0]] = _from_leaf(part, source, leaf)
    return {
        name: torch.cat([parts[i] for i in sorted(parts)], dim=-1) for name, parts in found.items()
    }


def _sources_of(sources: Sequence[Source], names: Sequence[str]) -> dict[str, Source]:
    by_leaf = {source.leaf: source for source in sources}
    lacking = [name for name in names if name not in by_leaf]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking[:8])}: the format has no name for it. "
            "Use a config that the format can hold, or add a Source."
        )
    return by_leaf


def _foreign_names(source: Source, model: Chain) -> list[str]:
    """Return the foreign name of a leaf, or those of its layers in their order."""
    name, _, rest = source.leaf.partition(".")
    segment = model.segments[name]
    if isinstance(segment, Segment):
        return [source.name]
    kind = rest.partition(".")[0]
    return [source.name.format(layer=i) for i, k in enumerate(segment.pattern) if k == kind]


def _borrowed(model: Chain) -> list[str]:
    """Return the paths that tied leaves would have if they were not tied."""
    return [
        f"{name}.{own}"
        for name, segment in model.segments.items()
        if not isinstance(segment, Stack)
        for own in segment.borrows
    ]


def _check_names(wanted: set[str], given: set[str]) -> None:
    for what, names in (("missing", wanted - given), ("left over", given - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:8])
            raise ValueError(
                f"{len(names)} tensors are {what}: {shown}. "
                "Give exactly the tensors of this config, or correct the config."
            )


def _to_leaf(tensor: Tensor, name: str, source: Source, leaf: Param, model: Chain) -> Tensor:
    """Split a foreign tensor into the leaf's axes and put them in the leaf's order."""
    index, number = source.part
    dims = _dims(source.axes)
    sizes = [[model.sizes[axis] for axis in axes] for axes in dims]
    shape = [math.prod(group) for group in sizes]
    shape[-1] *= number
    if list(tensor.shape) != shape:
        raise ValueError(
            f"{name}: shape is {list(tensor.shape)}, {source.leaf} needs {shape}. "
            "Correct the config."
        )
    part = tensor.chunk(number, dim=-1)[index].reshape([n for group in sizes for n in group])
    flat = [axis for axes in dims for axis in axes]
    return part.permute([flat.index(axis) for axis in leaf.names if axis != "layers"])


def _from_leaf(value: Tensor, source: Source, leaf: Param) -> Tensor:
    """Put a leaf's axes in the foreign order and merge them."""
    dims = _dims(source.axes)
    own = [axis for axis in leaf.names if axis != "layers"]
    out = value.permute([own.index(axis) for axes in dims for axis in axes])
    for dim, axes in enumerate(dims):
        out = out.flatten(dim, dim + len(axes) - 1)
    return out


def _dims(axes: str) -> list[list[str]]:
    """Read "embed (kv_heads head_dim)" as [["embed"], ["kv_heads", "head_dim"]]."""
    return [(merged or single).split() for merged, single in re.findall(r"\(([^)]*)\)|(\w+)", axes)]
