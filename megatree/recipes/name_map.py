"""Leaves as parts of foreign tensors and the other way round: a family's table, made of boxes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatree.functional.chain import Chain
from megatree.functional.param import Param, logical_shape
from megatree.functional.tree import flatten_with_names
from megatree.io.checkpoint import Leaf
from megatree.io.formats.arrays import Array
from megatree.io.formats.folded import Entry, Part, Side
from megatree.models.names import Source, fold, foreign_parts, sources_of

_VOCAB = "vocab"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a map, for people.

    Args:
        path: of the leaf.
        leaf: its axes.
        name: of the foreign tensor, "{layer}" for many.
        foreign: what its dims are made of.
        part: which part of it the leaf is, "" for all.
    """

    path: str
    leaf: str
    name: str
    foreign: str
    part: str


def declared(model: Chain) -> dict[str, Param]:
    """Return path -> declaration of the leaves of a model."""
    names, leaves, _ = flatten_with_names(model.params)
    return dict(zip(names, leaves, strict=True))


def leaf_of(path: str, prefix: str, model: Chain, array: Array) -> Leaf:
    """Return the leaf `prefix.path` of a checkpoint, with the dtype of an array."""
    param = declared(model)[path]
    shape = logical_shape(param, model.sizes, path)
    return Leaf(path=f"{prefix}.{path}", shape=shape, dtype=array.dtype, axes=param.axes)


def leaves_from(
    sources: Sequence[Source], model: Chain, arrays: Mapping[str, Array], place: str
) -> dict[str, Entry]:
    """Return the leaves of a model as parts of foreign tensors.

    Args:
        sources: the family's table.
        model: declares the leaves.
        arrays: what there is, by foreign name; a vocabulary there may be padded.
        place: for errors.

    Raises:
        ValueError: tensors are missing or of another shape (at most 8 are listed).
    """
    params = declared(model)
    by_leaf = sources_of(sources, list(params))
    missing, wrong, out = [], [], {}
    for path, param in params.items():
        source, parts = by_leaf[path], []
        spans = fold(source, param, model.sizes)
        for name, within in foreign_parts(source, model):
            if name not in arrays:
                missing.append(name)
                continue
            side = _padded(Side(dims=spans.foreign, within=within), arrays[name].shape)
            if side.shape != arrays[name].shape:
                wrong.append(f"{name}: {list(arrays[name].shape)}, {path} needs {list(side.shape)}")
            parts.append(Part(path=name, side=side))
        kinds = {arrays[part.path].dtype for part in parts}
        if len(kinds) > 1:
            wrong.append(f"{path}: its tensors have dtypes {', '.join(sorted(map(str, kinds)))}")
        if parts:
            side = Side(dims=spans.leaf, within=spans.within)
            array = Array(shape=side.shape, dtype=arrays[parts[0].path].dtype)
            out[path] = Entry(array=array, side=side, parts=tuple(parts))
    for what, problems in (("are missing", missing), ("do not fit", wrong)):
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(
                f"{place}: {len(problems)} tensors {what}: {'; '.join(problems[:8])}{more}. "
                "Copy the files anew, or correct the config."
            )
    return out


def foreign_from(
    sources: Sequence[Source],
    model: Chain,
    arrays: Mapping[str, Array],
    *,
    prefix: str,
    vocab: int | None = None,
) -> dict[str, Entry]:
    """Return the tensors of another format as parts of leaves; the inverse of `leaves_from`.

    Args:
        sources: the family's table.
        model: declares the leaves.
        arrays: the leaves, by `prefix.path`.
        prefix: "params".
        vocab: rows that tables have there; None for as many as there are.
    """
    params = declared(model)
    by_leaf = sources_of(sources, list(params))
    parts: dict[str, list[Part]] = defaultdict(list)
    sides: dict[str, Side] = {}
    for path, param in params.items():
        source = by_leaf[path]
        spans = fold(source, param, model.sizes)
        for name, within in foreign_parts(source, model):
            sides[name] = Side(dims=spans.foreign, within=within)
            own = Side(dims=spans.leaf, within=spans.within)
            parts[name].append(Part(path=f"{prefix}.{path}", side=own))
    out = {}
    for name, held in parts.items():
        kinds = {arrays[part.path].dtype for part in held}
        if len(kinds) > 1:
            raise ValueError(f"{name}: its parts have dtypes {kinds}. Convert them with --dtype.")
        side = sides[name]
        if vocab is not None and side.dims[0] and side.dims[0][0][0] == _VOCAB:
            side = replace(side, dims=(((_VOCAB, 0, vocab),), *side.dims[1:]))
        array = Array(shape=side.shape, dtype=kinds.pop())
        out[name] = Entry(array=array, side=side, parts=tuple(held))
    return out


def rows_of(sources: Sequence[Source], model: Chain) -> list[Row]:
    """Return the map of every leaf, for people."""
    params = declared(model)
    by_leaf = sources_of(sources, list(params))
    rows = []
    for path, param in params.items():
        source = by_leaf[path]
        part = f"{source.at[0]}={source.at[1]}" if source.at else ""
        rows.append(
            Row(path=path, leaf=param.axes, name=source.name, foreign=source.axes, part=part)
        )
    return rows


def _padded(side: Side, shape: tuple[int, ...]) -> Side:
    """Widen a vocabulary to the rows that the array has."""
    first = side.dims[0]
    if len(first) == 1 and first[0][0] == _VOCAB and shape and shape[0] > first[0][2]:
        return replace(side, dims=(((_VOCAB, 0, shape[0]),), *side.dims[1:]))
    return side
