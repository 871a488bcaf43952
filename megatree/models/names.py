"""Names and layouts that other formats give the leaves of `gpt`, as data."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatree.functional.chain import Chain, Stack
from megatree.functional.param import Param, logical_shape, padded_shape
from megatree.functional.tree import flatten_with_names

Span = tuple[str, int, int]
"""A range of an axis: (axis, start, stop)."""

Spans = tuple[tuple[Span, ...], ...]
"""What the dims of an array are made of, outermost first; () is a dim of size 1."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the values of a leaf are found in another format.

    Args:
        leaf: path of the leaf, "blocks.dense.wq".
        name: name of the foreign tensor; "{layer}" stands for the number of the layer, counted
            through all stacks, and "{expert}" for that of the expert. A leaf of a stack whose name
            has none is in a tensor of all layers, or of all experts.
        axes: the leaf's axes in the order in which the foreign tensor holds them, those that are
            one dim there in parentheses: "embed (kv_heads group head_dim)" is a matrix. An axis
            that the leaf lacks says its size, "part:3" or "slot:group+2".
        at: (axis, index) if the leaf is a part of the foreign tensor: it lies at this index of an
            axis that it lacks (from the end if negative), or begins there if it has one axis that
            `axes` do not name. The index may be that of another axis' size, "head_dim".
        split: "head_dim=pair half:2" if the foreign tensor keeps factors of an axis apart; one of
            them may go without a size.
    """

    leaf: str
    name: str
    axes: str
    at: tuple[str, int | str] | None = None
    split: str = ""

    @property
    def layered(self) -> bool:
        """Whether every layer has a tensor of its own."""
        return "{layer}" in self.name

    @property
    def apart(self) -> tuple[str, ...]:
        """The axes whose every index has a tensor of its own; the leaf's outermost ones."""
        axes = {"layers": self.layered, "experts": "{expert}" in self.name}
        return tuple(axis for axis, apart in axes.items() if apart)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """How a leaf and a foreign tensor share axes.

    Args:
        leaf: what the dims of the leaf are made of, the layers first if it has them.
        within: ranges of axes that the leaf lies in and has no dim of.
        foreign: what the dims of the foreign tensor are made of.
    """

    leaf: Spans
    within: tuple[Span, ...]
    foreign: Spans


def fold(source: Source, leaf: Param, sizes: Mapping[str, int]) -> Fold:
    """Return how a leaf lies in the foreign tensor of `source`.

    Args:
        source: of the leaf.
        leaf: its declaration.
        sizes: axis -> size, those of the model and of the format.

    Raises:
        ValueError: the axes are not those of the leaf.
    """
    known = dict(sizes) if leaf.stack is None else {**sizes, "layers": leaf.stack}
    whole, _, factors = source.split.partition("=")
    parts = _factors(factors, known[whole], known, source) if whole else ()
    known |= dict(parts)
    foreign = tuple(tuple(_span(word, known) for word in group) for group in _dims(source.axes))
    named = {span[0]: span for group in foreign for span in group}
    dims, within = [], []
    free = source.at
    for axis in leaf.names:
        if axis == whole:
            dims.append(tuple((name, 0, size) for name, size in parts))
        elif axis in named or axis in source.apart:
            dims.append(((axis, 0, known[axis]),))
        elif free is not None:
            start = _start(free, named, known)
            dims.append(((free[0], start, start + known[axis]),))
            free = None
        else:
            raise ValueError(f"{source.leaf}: {source.name} has no axis '{axis}'. Name it in axes.")
    if free is not None:
        start = _start(free, named, known)
        within.append((free[0], start, start + 1))
    return Fold(leaf=tuple(dims), within=tuple(within), foreign=foreign)


def _start(at: tuple[str, int | str], named: Mapping[str, Span], sizes: Mapping[str, int]) -> int:
    axis, index = at
    return (sizes[index] if isinstance(index, str) else index) % named[axis][2]


def _span(word: str, sizes: Mapping[str, int]) -> Span:
    name, _, size = word.partition(":")
    if not size:
        return name, 0, sizes[name]
    terms = [int(term) if term.isdigit() else sizes[term] for term in size.split("+")]
    return name, 0, sum(terms)


def _factors(
    words: str, whole: int, sizes: Mapping[str, int], source: Source
) -> tuple[tuple[str, int], ...]:
    given = {
        name: int(size) if size.isdigit() else sizes[size]
        for name, _, size in (word.partition(":") for word in words.split())
        if size
    }
    rest, left = divmod(whole, math.prod(given.values()))
    if left:
        raise ValueError(
            f"{source.leaf}: {whole} elements do not divide by {math.prod(given.values())}, as "
            f"{source.name} has it. Correct the config."
        )
    names = [word.partition(":")[0] for word in words.split()]
    return tuple((name, given.get(name, rest)) for name in names)


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
        Source(leaf=f"blocks.dense.{leaf}", name=f"{_GPT2_LAYER}.{name}", axes=axes, at=at)
        for leaf, name, axes, at in (
            ("norm1", "ln_1.weight", "embed", None),
            ("b_norm1", "ln_1.bias", "embed", None),
            ("wq", "attn.c_attn.weight", "embed (part:3 kv_heads group head_dim)", ("part", 0)),
            ("wk", "attn.c_attn.weight", "embed (part:3 kv_heads head_dim)", ("part", 1)),
            ("wv", "attn.c_attn.weight", "embed (part:3 kv_heads head_dim)", ("part", 2)),
            ("bq", "attn.c_attn.bias", "(part:3 kv_heads group head_dim)", ("part", 0)),
            ("bk", "attn.c_attn.bias", "(part:3 kv_heads head_dim)", ("part", 1)),
            ("bv", "attn.c_attn.bias", "(part:3 kv_heads head_dim)", ("part", 2)),
            ("wo", "attn.c_proj.weight", "(kv_heads group head_dim) embed", None),
            ("bo", "attn.c_proj.bias", "embed", None),
            ("norm2", "ln_2.weight", "embed", None),
            ("b_norm2", "ln_2.bias", "embed", None),
            ("w_up", "mlp.c_fc.weight", "embed ffn", None),
            ("b_up", "mlp.c_fc.bias", "ffn", None),
            ("w_down", "mlp.c_proj.weight", "ffn embed", None),
            ("b_down", "mlp.c_proj.bias", "embed", None),
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
    by_leaf = sources_of(sources, names)
    wanted = {name for leaf in names for name in foreign_names(by_leaf[leaf], model)}
    tied = {by_leaf[leaf].name for leaf in _borrowed(model) if leaf in by_leaf}
    _check_names(wanted, set(tensors) - (tied - wanted))
    values = []
    for path, leaf in zip(names, leaves, strict=True):
        source = by_leaf[path]
        parts = [
            _to_leaf(tensors[name], name, source, leaf, model)
            for name in foreign_names(source, model)
        ]
        value = parts[0]
        if source.apart:
            outer = logical_shape(leaf, model.sizes, path)[: len(source.apart)]
            value = torch.stack(parts).unflatten(0, outer)
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
    by_leaf = sources_of(sources, names)
    found: dict[str, Tensor] = {}
    values: list[Any] = spec.flatten_up_to(params)
    for path, leaf, value in zip(names, leaves, values, strict=True):
        source = by_leaf[path]
        value = value[tuple(slice(0, n) for n in logical_shape(leaf, model.sizes, path))]
        apart = value.flatten(0, len(source.apart) - 1) if source.apart else [value]
        for name, part in zip(foreign_names(source, model), apart, strict=True):
            spans = fold(source, leaf, model.sizes)
            shape = [_size(group) for group in spans.foreign]
            out = found.setdefault(name, value.new_zeros(shape))
            _window(out, spans).copy_(_to_atoms(part, spans, source))
    return found


def sources_of(sources: Sequence[Source], names: Sequence[str]) -> dict[str, Source]:
    """Return the source of every leaf.

    Raises:
        ValueError: a leaf has none.
    """
    by_leaf = {source.leaf: source for source in sources}
    lacking = [name for name in names if name not in by_leaf]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking[:8])}: the format has no name for it. "
            "Use a config that the format can hold, or add a Source."
        )
    return by_leaf


def foreign_names(source: Source, model: Chain) -> list[str]:
    """Return the foreign name of a leaf, or those of its layers (and their experts) in order."""
    return [name for name, _ in foreign_parts(source, model)]


def foreign_parts(source: Source, model: Chain) -> list[tuple[str, tuple[Span, ...]]]:
    """Return the foreign names of a leaf in order, each with the ranges of `source.apart`."""
    layers = _layers(source, model) if source.layered else [0]
    experts = range(model.sizes["experts"]) if "experts" in source.apart else [0]
    out = []
    for at, layer in enumerate(layers):
        for expert in experts:
            index = {"layers": at, "experts": expert}
            spans = tuple((axis, index[axis], index[axis] + 1) for axis in source.apart)
            out.append((source.name.format(layer=layer, expert=expert), spans))
    return out


def _layers(source: Source, model: Chain) -> list[int]:
    """Return the numbers of the layers of a leaf's kind, counted through all stacks."""
    name, _, rest = source.leaf.partition(".")
    kind, before = rest.partition(".")[0], 0
    for other, segment in model.segments.items():
        if isinstance(segment, Stack):
            if other == name:
                return [before + i for i, k in enumerate(segment.pattern) if k == kind]
            before += len(segment.pattern)
    raise ValueError(f"{source.leaf}: {source.name} has layers, and {name!r} is no stack.")


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
    """Take a leaf's part of a foreign tensor and put its axes in the leaf's order."""
    spans = fold(source, leaf, model.sizes)
    shape = [_size(group) for group in spans.foreign]
    if list(tensor.shape) != shape:
        raise ValueError(
            f"{name}: shape is {list(tensor.shape)}, {source.leaf} needs {shape}. "
            "Correct the config."
        )
    atoms = _window(tensor.contiguous(), spans)
    flat = [axis for group in spans.foreign for axis, _, _ in group]
    own = _own(spans, source)
    order = [flat.index(axis) for group in own for axis, _, _ in group]
    lacking = [dim for dim in range(len(flat)) if dim not in order]
    moved = atoms.permute([*order, *lacking])
    return moved.reshape([_size(group) for group in own])


def _to_atoms(value: Tensor, spans: Fold, source: Source) -> Tensor:
    """Put a leaf's axes in the foreign order; axes that it lacks are of size 1."""
    own = [span for group in _own(spans, source) for span in group]
    atoms = value.reshape([stop - start for _, start, stop in own])
    names = [axis for axis, _, _ in own]
    flat = [axis for group in spans.foreign for axis, _, _ in group]
    lacking = [axis for axis in flat if axis not in names]
    moved = atoms.reshape([*atoms.shape, *[1] * len(lacking)])
    names += lacking
    return moved.permute([names.index(axis) for axis in flat])


def _window(tensor: Tensor, spans: Fold) -> Tensor:
    """View a foreign tensor by its axes, and of them the part that a leaf lies in."""
    out = tensor.view([stop for group in spans.foreign for _, _, stop in group])
    own = {span[0]: span for group in (*spans.leaf, spans.within) for span in group}
    for dim, (axis, _, _) in enumerate(span for group in spans.foreign for span in group):
        _, start, stop = own[axis]
        out = out.narrow(dim, start, stop - start)
    return out


def _own(spans: Fold, source: Source) -> Spans:
    """Return the dims of a leaf without those that are another tensor each."""
    return spans.leaf[len(source.apart) :]


def _size(group: tuple[Span, ...]) -> int:
    return math.prod(stop - start for _, start, stop in group)


def _dims(axes: str) -> list[list[str]]:
    """Read "embed (kv_heads head_dim)" as [["embed"], ["kv_heads", "head_dim"]]."""
    return [(merged or single).split() for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", axes)]
