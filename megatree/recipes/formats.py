"""Checkpoints of every format, opened as our leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor

from megatree.io.checkpoint import Box, Leaf, latest
from megatree.io.checkpoint.box import spelled
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.checkpoint.manifest import MANIFEST_FILE
from megatree.io.checkpoint.place import place_of
from megatree.io.formats.arrays import Array, Reader, grid
from megatree.io.formats.dcp import METADATA, DcpReader
from megatree.io.formats.folded import Entry, Folded
from megatree.io.formats.hf import CONFIG, INDEX, SINGLE, HfReader, read_json
from megatree.io.formats.megatron import TABLE, iteration_folder, read_legacy
from megatree.io.formats.megatron_state import groups_of, steps_of
from megatree.io.formats.meta import meta_reader, read_params
from megatree.io.formats.names import checked_file
from megatree.io.formats.native import NativeReader
from megatree.io.formats.orbax import TREE, OrbaxReader
from megatree.io.formats.shards import Part, require_copy
from megatree.io.formats.side import read_side
from megatree.io.formats.torch_dist import (
    MOMENTS,
    bucket_state,
    groups_in,
    in_buckets,
    read_torch_dist,
)
from megatree.models import hugging_face, megatron, meta
from megatree.models.decoder import decoder
from megatree.models.gpt_config import GPTConfig
from megatree.models.names import Source
from megatree.recipes.config import OptimizerConfig, RunConfig, TrainConfig
from megatree.recipes.megatron_state import to_extra
from megatree.recipes.name_map import Row, declared, leaf_of, leaves_from, rows_of
from megatree.recipes.saved import from_plain, load_config
from megatree.runtime.refusals import refusal

Format = Literal["megatree", "hf", "meta", "megatron", "torch_dist", "dcp", "orbax"]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint as leaves of ours.

    Args:
        path: where it is.
        format: of it.
        model: sizes and choices of the model; None if nobody says.
        reader: the arrays, by path of the leaf ("params.embed.table").
        leaves: their declarations.
        extra: training state.
        rows: how leaves lie in foreign tensors, where they have other names there.
        starts: what is before the names of `rows` for leaves of the optimizer, by "opt.m".
        unmapped: foreign tensors that no leaf takes.
        left_out: foreign tensors that no leaf needs, with the reason.
    """

    path: Path
    format: Format
    model: GPTConfig | None
    reader: Reader
    leaves: Mapping[str, Leaf]
    extra: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    starts: Mapping[str, str] = field(default_factory=dict)
    unmapped: Sequence[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def refuse_unmapped(self) -> None:
        """Raise if a foreign tensor has no leaf.

        Raises:
            ValueError: listing at most 8.
        """
        if self.unmapped:
            more = f" and {len(self.unmapped) - 8} more" if len(self.unmapped) > 8 else ""
            raise ValueError(
                f"{self.path}: {len(self.unmapped)} tensors have no leaf: "
                f"{', '.join(self.unmapped[:8])}{more}. "
                "Nothing is dropped silently: correct the config, or add a Source for them."
            )


def detect(path: Path) -> Format:
    """Return the format of a checkpoint, by the names of its files.

    Raises:
        ValueError: it is none that we know.
    """
    if "://" in str(path) or (path / MANIFEST_FILE).exists() or latest(path) is not None:
        return "megatree"
    if not path.is_dir():
        raise ValueError(f"{path}: no folder. Give the folder of a checkpoint.")
    if (path / "params.json").exists():
        return "meta"
    if (path / CONFIG).exists() and any((path / name).exists() for name in (SINGLE, INDEX)):
        return "hf"
    if (path / TREE).exists() or (path / "default" / TREE).exists():
        return "orbax"
    folder = iteration_folder(path)
    if (folder / "metadata.json").exists() and (folder / METADATA).exists():
        return "torch_dist"
    if any(folder.glob("mp_rank_*")):
        return "megatron"
    if (path / METADATA).exists():
        return "dcp"
    raise ValueError(f"{path}: no checkpoint that we know. Say which format it is with --from.")


def open_checkpoint(
    path: str | Path,
    kind: Format | None = None,
    *,
    like: GPTConfig | None = None,
    weights_only: bool = False,
) -> Opened:
    """Open a checkpoint of any format; nothing but headers is read.

    Args:
        path: a folder.
        kind: its format; None looks.
        like: the model, where the checkpoint does not say (and against what it says).
        weights_only: leave the optimizer's state where it is.

    Raises:
        ValueError: the checkpoint is damaged, hostile or of a model that we do not compute.
    """
    path = Path(path)
    kind = kind or detect(path)
    try:
        opened = _OPEN[kind](path, like, weights_only)
    except (ValueError, *_DAMAGE) as error:
        if refusal(error) is not None:  # a ValueError of ours, which says what is wrong and where
            raise
        raise ValueError(
            f"{path}: its files do not say what a checkpoint of {kind} says "
            f"({type(error).__name__}: {str(error)[:200]}). Take another copy, or name its format "
            "with --from."
        ) from error
    if weights_only:
        kept = {p: leaf for p, leaf in opened.leaves.items() if p.startswith("params.")}
        opened = replace(opened, leaves=kept, reader=Picked(opened.reader, kept))
    return opened


# What code that expects a number, a list or a key meets in files that someone else wrote.
_DAMAGE = (TypeError, KeyError, AttributeError, IndexError, ArithmeticError)


def check_layers(cfg: GPTConfig, arrays: Mapping[str, Array], place: str) -> None:
    """Refuse a config that has more layers than there can be, before anything is made for them.

    Raises:
        ValueError: more than tensors, or than the longest stack of them.
    """
    stacked = max((array.shape[0] for array in arrays.values() if array.shape), default=0)
    most = max(len(arrays), stacked)
    if not 0 < cfg.num_layers <= most:
        raise ValueError(
            f"{place}: its config says {cfg.num_layers} layers, and its {len(arrays)} tensors hold "
            f"{most} at most. Correct the config, or copy the files anew."
        )


@dataclass(frozen=True)
class Picked:
    """A reader of some of the arrays."""

    source: Reader
    kept: Mapping[str, Any]

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        """What there is."""
        return {path: self.source.arrays[path] for path in self.kept}

    def read(self, path: str, box: Box) -> Tensor:
        """Return the elements of a box."""
        return self.source.read(path, box)


@dataclass(frozen=True)
class _Joined:
    """Weights of one reader, and the state of an optimizer of another."""

    weights: Reader
    state: Reader

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        own = {n: x for n, x in self.weights.arrays.items() if not n.startswith("optimizer.")}
        return {**own, **self.state.arrays}

    def read(self, path: str, box: Box) -> Tensor:
        source = self.state if path in self.state.arrays else self.weights
        return source.read(path, box)


@dataclass(frozen=True)
class _Renamed:
    """A reader of arrays under other names."""

    source: Reader
    names: Mapping[str, str]

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        return {new: self.source.arrays[old] for new, old in self.names.items()}

    def read(self, path: str, box: Box) -> Tensor:
        return self.source.read(self.names[path], box)


def run_config(model: GPTConfig, dtype: torch.dtype, tokenizer: str = "") -> RunConfig:
    """Return the config of a run that has this model; the rest is for whoever trains on."""
    name: Any = dtype_name(dtype)
    if name not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"dtype: a run cannot be in {name}. Convert it with --dtype bfloat16.")
    cfg = RunConfig(
        model=model,
        optimizer=OptimizerConfig(lr=1e-5),
        train=TrainConfig(steps=1, global_batch=1, microbatch=1),
        dtype=name,
    )
    return replace(cfg, data=replace(cfg.data, tokenizer=tokenizer)) if tokenizer else cfg


def _open_native(path: Path, like: GPTConfig | None, weights_only: bool) -> Opened:
    place = place_of(path)
    found = place if place.holds(MANIFEST_FILE) else latest(path)
    if found is None:
        raise ValueError(f"{path}: no checkpoint and no folder of checkpoints. Give one.")
    reader = NativeReader(str(found))
    extra = dict(reader.manifest.extra)
    return Opened(
        path=Path(str(found)),
        format="megatree",
        model=like or _model_in(extra, path),
        reader=reader,
        leaves=reader.leaves,
        extra=extra,
    )


def _model_in(extra: Mapping[str, Any], path: Path) -> GPTConfig | None:
    told = extra.get("config")
    return from_plain(told, f"{path}: config").model if told is not None else None


def _open_named(path: Path, kind: Format, reader: Reader, like: GPTConfig | None) -> Opened:
    """Open a format that holds leaves under our own names."""
    side = read_side(path)
    axes, extra = side if side is not None else ({}, {})
    model = like or _model_in(extra, path)
    if not axes:
        if model is None:
            raise ValueError(
                f"{path}: does not say what its axes are. Name a config that does with --like."
            )
        return _like(path, kind, reader, model)
    unmapped = sorted(set(reader.arrays) - set(axes))
    leaves = {
        name: Leaf(path=name, shape=array.shape, dtype=array.dtype, axes=axes[name])
        for name, array in reader.arrays.items()
        if name in axes
    }
    lacking = sorted(set(axes) - set(leaves))
    if lacking:
        raise ValueError(f"{path}: lacks {', '.join(lacking[:8])}. Copy it anew.")
    return Opened(
        path=path, format=kind, model=model, reader=Picked(reader, leaves), leaves=leaves,
        extra=extra, unmapped=unmapped,
    )  # fmt: skip


def _like(path: Path, kind: Format, reader: Reader, cfg: GPTConfig) -> Opened:
    """Take the leaves of a model out of a tree that others wrote, with or without "params"."""
    check_layers(cfg, reader.arrays, str(path))
    model = decoder(cfg, batch_size=1)
    wanted = list(declared(model))
    start = "params." if any(name.startswith("params.") for name in reader.arrays) else ""
    names = {f"params.{name}": f"{start}{name}" for name in wanted}
    for entry in ("m", "v", "master"):
        moments = {f"opt.{entry}.{name}": f"opt.{entry}.{name}" for name in wanted}
        if all(name in reader.arrays for name in moments):
            names |= moments
    lacking = sorted(old for old in names.values() if old not in reader.arrays)
    if lacking:
        raise ValueError(
            f"{path}: lacks {', '.join(lacking[:8])}. Name the config of this model with --like."
        )
    leaves = {}
    for new, old in names.items():
        array = reader.arrays[old]
        bare = new.removeprefix("params.")
        head = "params"
        if new.startswith("opt."):
            _, entry, bare = new.split(".", 2)
            head = f"opt.{entry}"
        leaves[new] = leaf_of(bare, head, model, array)
        if leaves[new].shape != array.shape:
            raise ValueError(
                f"{path}: {old} is {list(array.shape)}, the model has {list(leaves[new].shape)}. "
                "Name the config of this model with --like."
            )
    return Opened(
        path=path, format=kind, model=cfg, reader=_Renamed(reader, names), leaves=leaves,
        unmapped=sorted(set(reader.arrays) - set(names.values())),
    )  # fmt: skip


def _open_dcp(path: Path, like: GPTConfig | None, weights_only: bool) -> Opened:
    return _open_named(path, "dcp", DcpReader(path), like)


def _open_orbax(path: Path, like: GPTConfig | None, weights_only: bool) -> Opened:
    return _open_named(path, "orbax", OrbaxReader(path), like)


def _mapped(
    path: Path,
    kind: Format,
    reader: Reader,
    cfg: GPTConfig,
    sources: Sequence[Source],
    *,
    extra: Mapping[str, Any] | None = None,
    left_out: Mapping[str, str] | None = None,
    groups: Mapping[str, tuple[str, Sequence[Source]]] | None = None,
) -> Opened:
    """Open a format that has names and layouts of its own.

    Args:
        groups: start of a foreign name -> start of ours, and names after it; `sources` are those
            of "params".
    """
    check_layers(cfg, reader.arrays, str(path))
    model = decoder(cfg, batch_size=1)
    entries: dict[str, Entry] = {}
    leaves: dict[str, Leaf] = {}
    taken = set(left_out or ())
    for start, (prefix, names) in {"": ("params", sources), **(groups or {})}.items():
        arrays = {
            name.removeprefix(start): array
            for name, array in reader.arrays.items()
            if name.startswith(start)
        }
        where = f"{path}: {start.rstrip('.')}" if start else str(path)
        for leaf, entry in leaves_from(names, model, arrays, where).items():
            parts = tuple(replace(part, path=f"{start}{part.path}") for part in entry.parts)
            entries[f"{prefix}.{leaf}"] = replace(entry, parts=parts)
            leaves[f"{prefix}.{leaf}"] = leaf_of(leaf, prefix, model, entry.array)
            taken |= {part.path for part in parts}
    return Opened(
        path=path,
        format=kind,
        model=cfg,
        reader=Folded(source=reader, entries=entries),
        leaves=leaves,
        extra=extra or {},
        rows=rows_of(sources, model),
        starts={prefix: start for start, (prefix, _) in (groups or {}).items()},
        unmapped=sorted(set(reader.arrays) - taken),
        left_out=left_out or {},
    )


_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def _open_hf(path: Path, like: GPTConfig | None, weights_only: bool) -> Opened:
    file = checked_file(path, CONFIG, place=str(path))
    config = read_json(file)
    family = hugging_face.family_of(config, str(file))
    _refuse_no_numbers(config, family.keys, file)
    cfg = like or hugging_face.to_gpt_config(config, str(file))
    reader: Reader = HfReader(path)
    if "wte.weight" in reader.arrays:  # GPT2Model, without the head on top
        names = {name: name for name in reader.arrays if name == "lm_head.weight"}
        names |= {f"transformer.{name}": name for name in reader.arrays if name not in names}
        reader = _Renamed(reader, names)
    left_out = {n: "a buffer, not a weight" for n in reader.arrays if n.endswith(_BUFFERS)}
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    table = "transformer.wte.weight" if family is hugging_face.GPT2_FAMILY else table
    if (
        like is None
        and cfg.mtp
        and not any(name.startswith(f"model.layers.{cfg.num_layers}.") for name in reader.arrays)
    ):  # the class of transformers neither loads nor writes these layers
        cfg = replace(cfg, mtp=None)
    copies = hugging_face.copies_in(cfg) | ({head: table} if cfg.tied else {})
    for copy, name in copies.items():
        if copy in reader.arrays:
            _refuse_other_copy(reader, copy, name, path)
            left_out[copy] = f"the same as {name}, which it is tied to"
    sources = hugging_face.sources_for(family, cfg)
    return _mapped(path, "hf", reader, cfg, sources, left_out=left_out)


def _refuse_no_numbers(config: Mapping[str, Any], keys: Mapping[str, str], file: Path) -> None:
    """Refuse values of other types where numbers are expected, and sizes that are absent."""
    needed = {f.name for f in fields(GPTConfig) if f.default is MISSING} - {"ffn"}
    for key in (*keys, "num_attention_heads", "num_key_value_heads", "head_dim", "n_head"):
        value = config.get(key)
        if value is None and keys.get(key) in needed:
            raise ValueError(f"{file}: lacks {key}. Copy it anew.")
        if not isinstance(value, (int, float, NoneType)):
            raise ValueError(f"{file}: {key} is {value!r}, no number. Copy it anew.")


def _refuse_other_copy(reader: Reader, copy: str, name: str, path: Path) -> None:
    """A tied table that is stored too must be the same, bit for bit."""
    if name not in reader.arrays:
        raise ValueError(f"{path}: has {copy}, and no {name}, which it is tied to. Copy it anew.")
    first, second = (
        Part(array=reader.arrays[x], read=partial(reader.read, x)) for x in (name, copy)
    )
    which = f"{path}: {copy} is stored beside {name}, though config.json ties them"
    fix = "Set tie_word_embeddings to false if the model has two tables, or remove one."
    require_copy(first, second, which, name, fix)


def _open_meta(path: Path, like: GPTConfig | None, weights_only: bool) -> Opened:
    params = read_params(path)
    reader = meta_reader(path, meta.CUT, meta.IGNORED)
    shapes = {name: array.shape for name, array in reader.arrays.items()}
    cfg = like or meta.to_gpt_config(params, shapes, str(path / "params.json"))
    return _mapped(path, "meta", reader, cfg, meta.META)


def _open_megatron(path: Path, like: GPTConfig | None, weights_only: bool) -> Opened:
    held = read_legacy(
        path,
        megatron.CUT,
        megatron.modern_name,
        tied="output_layer.weight",
        optimizer=not weights_only,
    )
    cfg = like or megatron.to_gpt_config(held.args, str(path))
    sources = megatron.sources(
        cfg, stacked=False, tensor=held.tensor, version=min(3, int(held.version))
    )
    groups, left_out = _state_groups(held.reader, sources)
    extra = to_extra(held.iteration, held.updates, held.groups, held.scheduler, held.args)
    return _mapped(
        path, "megatron", held.reader, cfg, sources, extra=extra, left_out=left_out, groups=groups,
    )  # fmt: skip


def _state_groups(
    reader: Reader, sources: Sequence[Source]
) -> tuple[dict[str, tuple[str, Sequence[Source]]], dict[str, str]]:
    """Return Megatron's optimizer as groups of leaves, and what of it is left out."""
    groups: dict[str, tuple[str, Sequence[Source]]] = {}
    left_out: dict[str, str] = {}
    dtype = reader.arrays[TABLE].dtype
    for start, entry in MOMENTS.items():
        names = [name for name in reader.arrays if name.startswith(start)]
        if entry == "master":
            _refuse_other_masters(reader, start, names)
        if entry == "master" and dtype in (torch.float32, torch.float64):
            left_out |= dict.fromkeys(names, "copies of float32 weights")
        elif names:
            groups[start] = f"opt.{entry}", sources
    return groups, left_out


_LOOKED_AT = 2048
"""Bytes at the begin and at the end of each master that are looked at."""


def _refuse_other_masters(reader: Reader, start: str, names: Sequence[str]) -> None:
    """Masters must round to the weights, where both have one layout; both ends are looked at.

    Megatron's reshardable layout loses what lies behind buckets that end unaligned (seen in 0.16).
    """
    for name in names:
        bare = name.removeprefix(start)
        if bare not in reader.arrays:
            continue
        boxes = list(grid(reader.arrays[name], _LOOKED_AT))
        for box in (boxes[0], boxes[-1]):
            weight, master = reader.read(bare, box), reader.read(name, box)
            odd = int((master.to(weight.dtype) != weight).sum())
            if odd:
                raise ValueError(
                    f"{name}: {odd} of {weight.numel()} elements in {spelled(box)} are no masters "
                    f"of {bare}: the optimizer's state is damaged, or of another run. Save it "
                    "anew in Megatron's default layout, or convert with --weights-only."
                )


def _open_torch_dist(path: Path, like: GPTConfig | None, weights_only: bool) -> Opened:
    told, common = read_torch_dist(path, optimizer=not weights_only)
    reader: Reader = told
    args = common.get("args") or {}
    cfg = like or megatron.to_gpt_config(args, str(path))
    sources = state_sources = megatron.sources(cfg, stacked=True)
    if weights_only:
        groups: dict[str, tuple[str, Sequence[Source]]] = {}
        odd = [name for name in reader.arrays if name.startswith("optimizer.")]
        left_out = dict.fromkeys(odd, "optimizer's state (--weights-only)")
    else:
        if in_buckets(told):
            fused = args.get("transformer_impl") != "local"
            orders = [partial(megatron.in_order, fused=which) for which in (fused, not fused)]
            state = bucket_state(
                told,
                args,
                cut=megatron.CUT,
                modern=megatron.modern_name,
                orders=orders,
                tied="output_layer.weight",
            )
            reader = _Joined(told, state)
            tensor = int(args.get("tensor_model_parallel_size") or 1)
            state_sources = megatron.sources(cfg, stacked=False, tensor=tensor)
        groups, left_out = _state_groups(reader, state_sources)
    optimizer = groups_in(told, common)
    extra = to_extra(
        int(common.get("iteration") or 0),
        steps_of(optimizer),
        groups_of(optimizer),
        common.get("opt_param_scheduler") or {},
        args,
    )
    return _mapped(
        path, "torch_dist", reader, cfg, sources, extra=extra, left_out=left_out, groups=groups,
    )  # fmt: skip


_OPEN: Mapping[Format, Callable[[Path, GPTConfig | None, bool], Opened]] = {
    "megatree": _open_native,
    "hf": _open_hf,
    "meta": _open_meta,
    "megatron": _open_megatron,
    "torch_dist": _open_torch_dist,
    "dcp": _open_dcp,
    "orbax": _open_orbax,
}


def model_like(path: str) -> GPTConfig:
    """Return the model of a config.json: of a run of ours, or of a Hugging Face folder."""
    file = Path(path)
    plain = read_json(file)
    if "model_type" in plain:
        _refuse_no_numbers(plain, hugging_face.family_of(plain, path).keys, file)
        return hugging_face.to_gpt_config(plain, path)
    return load_config(file).model
