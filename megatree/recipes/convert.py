"""Convert a checkpoint of one format into another, a box at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatree.io.checkpoint import step_name
from megatree.io.checkpoint.directory import staged, sync
from megatree.io.checkpoint.dtypes import dtype_name
from megatree.io.checkpoint.place import Folder
from megatree.io.formats.arrays import BOX_BYTES, Array, Reader, Writer, copy
from megatree.io.formats.cast import Cast
from megatree.io.formats.dcp import DcpWriter
from megatree.io.formats.folded import Folded
from megatree.io.formats.hf import SHARD_BYTES, copy_tokenizer, hf_writer
from megatree.io.formats.megatron import TABLE, LegacyWriter
from megatree.io.formats.megatron_state import STATE
from megatree.io.formats.native import NativeWriter
from megatree.io.formats.orbax import OrbaxWriter
from megatree.io.formats.side import write_side
from megatree.io.formats.torch_dist import CONTENT, MOMENTS, RESHARDABLE, TorchDistWriter
from megatree.io.world import World
from megatree.models import hugging_face, megatron
from megatree.models.decoder import decoder
from megatree.models.gpt_config import GPTConfig
from megatree.models.names import Source
from megatree.recipes.formats import Format, Opened, check_layers, open_checkpoint, run_config
from megatree.recipes.megatron_state import beside, state_entries
from megatree.recipes.name_map import Row, declared, foreign_from, rows_of
from megatree.recipes.saved import CONFIG_FILE, to_json, to_plain


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a conversion goes.

    Args:
        source, target: formats; no source looks.
        like: the model, where the source does not say.
        dtype: of floating-point arrays; None keeps them.
        weights_only: leave the optimizer's state out.
        tensor, pipeline: ranks of a `megatron` checkpoint.
        vocab_divisor: rows of Megatron's tables are a multiple of this times the tensor ranks.
        shard_bytes: most bytes of a safetensors file.
        box_bytes: bytes of a box, several of which are held at a time.
    """

    source: Format | None = None
    target: Format = "megatree"
    like: GPTConfig | None = None
    dtype: torch.dtype | None = None
    weights_only: bool = False
    tensor: int = 1
    pipeline: int = 1
    vocab_divisor: int = 128
    shard_bytes: int = SHARD_BYTES
    box_bytes: int = BOX_BYTES

    def __post_init__(self) -> None:
        names = ("tensor", "pipeline", "vocab_divisor", "shard_bytes", "box_bytes")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"convert: {name} is {getattr(self, name)}. Give at least 1.")
        if self.target == "meta":
            raise ValueError("convert: meta is read only. Write hf, which says the same.")
        if self.target != "megatron" and (self.tensor, self.pipeline) != (1, 1):
            raise ValueError(
                "convert: --tensor and --pipeline are of --to megatron; other formats load on any "
                "mesh. Leave them out."
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion would do.

    Args:
        opened: the source.
        reader: the arrays as the target has them.
        rows: how leaves lie in the target's tensors, where they have other names there.
        starts: what is before those names for leaves of the optimizer, by "opt.m".
        unmapped: leaves that the target cannot hold.
        make: folder -> writer.
    """

    opened: Opened
    reader: Reader
    rows: tuple[Row, ...]
    starts: Mapping[str, str]
    unmapped: tuple[str, ...]
    make: Callable[[Path], Writer]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(array.nbytes for array in self.reader.arrays.values())

    def refuse_unmapped(self) -> None:
        """Raise if anything has no place.

        Raises:
            ValueError: listing at most 8.
        """
        self.opened.refuse_unmapped()
        if self.unmapped:
            more = f" and {len(self.unmapped) - 8} more" if len(self.unmapped) > 8 else ""
            raise ValueError(
                f"{self.opened.path}: {len(self.unmapped)} leaves have no place in the target: "
                f"{', '.join(self.unmapped[:8])}{more}. "
                "Leave the optimizer's state out with --weights-only, or write dcp or orbax."
            )


def plan_conversion(source: str, options: Options) -> Plan:
    """Open the source and lay out the target; nothing is written.

    Raises:
        ValueError: the source is damaged, or the target cannot hold the model.
    """
    opened = open_checkpoint(
        source, options.source, like=options.like, weights_only=options.weights_only
    )
    if options.dtype is not None:
        opened = _cast(opened, options.dtype)
    if options.target == "megatree":
        return _to_native(opened, options)
    if options.target in ("dcp", "orbax"):
        return _to_named(opened, options)
    return _to_mapped(opened, options)


def convert(
    source: str,
    target: str,
    options: Options,
    told: Callable[[str, int], None] = lambda path, nbytes: None,
) -> Plan:
    """Convert; the target appears whole or not at all.

    Args:
        source: folder of a checkpoint.
        target: folder to make.
        options: how.
        told: called after each box, with the array and the bytes of the box.

    Raises:
        ValueError: something has no place in the target, which is listed, or it exists.
    """
    plan = plan_conversion(source, options)
    plan.refuse_unmapped()
    if "://" in target:
        raise ValueError(f"{target}: conversions write to folders. Copy the result there.")
    with staged(Folder(target), World.single()) as folder:
        writer = plan.make(Path(folder))
        copy(plan.reader, writer, most_bytes=options.box_bytes, told=told)
        for entry in sorted(Path(folder).rglob("*")):
            if entry.is_dir():
                sync(entry)
    return plan


def _cast(opened: Opened, dtype: torch.dtype) -> Opened:
    """Convert the weights; the optimizer's state keeps its dtype."""
    weights = {path for path in opened.leaves if path.startswith("params.")}
    if opened.model is not None:  # a leaf of a dtype of its own keeps it
        params = declared(decoder(opened.model, batch_size=1))
        weights -= {f"params.{path}" for path, leaf in params.items() if leaf.dtype is not None}
    reader = Cast(source=opened.reader, dtype=dtype, only=frozenset(weights))
    leaves = {
        path: replace(leaf, dtype=reader.arrays[path].dtype) for path, leaf in opened.leaves.items()
    }
    return replace(opened, reader=reader, leaves=leaves)


def _model_of(opened: Opened) -> GPTConfig:
    if opened.model is None:
        raise ValueError(
            f"{opened.path}: does not say what model it is of. Name a config with --like."
        )
    return opened.model


def _dtype_of(opened: Opened) -> torch.dtype:
    return opened.reader.arrays["params.embed.table"].dtype


def _tokenizer_folder(opened: Opened) -> Path:
    """Return where tokenizer files are: in a run's folder, one up from its steps."""
    return opened.path.parent if opened.format == "megatree" else opened.path


def _extra_of(opened: Opened, tokenizer: str = "") -> dict[str, Any]:
    """Return the training state, with a config that says what model this is."""
    extra: dict[str, Any] = {"step": 0, **opened.extra}
    if "config" not in extra and opened.model is not None:
        extra["config"] = to_plain(run_config(opened.model, _dtype_of(opened), tokenizer))
    elif opened.model is not None:
        extra["config"] = {**extra["config"], "dtype": dtype_name(_dtype_of(opened))}
    return extra


def _to_native(opened: Opened, options: Options) -> Plan:
    def make(folder: Path) -> Writer:
        names = copy_tokenizer(_tokenizer_folder(opened), folder)
        final = _final_name(folder)
        spelled = str(final) if "tokenizer.json" in names or "tokenizer.model" in names else ""
        extra = _extra_of(opened, spelled)
        step = folder / step_name(int(extra["step"]))
        step.mkdir()
        if opened.model is not None:
            cfg = run_config(opened.model, _dtype_of(opened), spelled)
            Folder(folder).put(CONFIG_FILE, to_json(cfg).encode())
        return NativeWriter(step, opened.leaves, extra, options.box_bytes)

    return Plan(
        opened=opened,
        reader=opened.reader,
        rows=tuple(opened.rows),
        starts=opened.starts,
        unmapped=(),
        make=make,
    )


def _final_name(staging: Path) -> Path:
    """Return the folder that a staging directory will become: `.NAME.<hex>.megatree-tmp`."""
    return staging.parent / staging.name[1:].rsplit(".", 2)[0]


def _to_named(opened: Opened, options: Options) -> Plan:
    kind = DcpWriter if options.target == "dcp" else OrbaxWriter

    def make(folder: Path) -> Writer:
        axes = {path: leaf.axes for path, leaf in opened.leaves.items()}
        write_side(folder, axes, _extra_of(opened))
        if kind is OrbaxWriter:
            return OrbaxWriter(folder, opened.reader.arrays, options.box_bytes)
        return DcpWriter(folder, opened.reader.arrays)

    return Plan(
        opened=opened,
        reader=opened.reader,
        rows=tuple(opened.rows),
        starts=opened.starts,
        unmapped=(),
        make=make,
    )


def _to_mapped(opened: Opened, options: Options) -> Plan:
    cfg = _model_of(opened)
    check_layers(cfg, opened.reader.arrays, str(opened.path))
    model = decoder(cfg, batch_size=1)
    sources, vocab = _table(cfg, options)
    arrays = opened.reader.arrays
    entries = foreign_from(sources, model, arrays, prefix="params", vocab=vocab)
    if options.target == "hf":
        entries |= {copy: entries[name] for copy, name in hugging_face.copies_in(cfg).items()}
    if options.target == "megatron":
        entries = {name: entries[name] for name in megatron.in_order(entries)}
    state = {}
    if options.target in ("megatron", "torch_dist"):
        state = state_entries(sources, model, arrays, vocab=vocab)
    reader = Folded(source=opened.reader, entries={**entries, **state})
    held = {part.path for entry in reader.entries.values() for part in entry.parts}

    def make(folder: Path) -> Writer:
        return _mapped_writer(folder, cfg, opened, reader.arrays, options)

    return Plan(
        opened=opened,
        reader=reader,
        rows=tuple(rows_of(sources, model)),
        starts=_starts() if state else {},
        unmapped=tuple(sorted(set(opened.leaves) - held)),
        make=make,
    )


def _starts() -> dict[str, str]:
    """Return what is before Megatron's names of state, by our entry; the first of two names."""
    return {f"opt.{entry}": start for start, entry in reversed(list(MOMENTS.items()))}


def _table(cfg: GPTConfig, options: Options) -> tuple[tuple[Source, ...], int | None]:
    """Return the names of the target, and the rows that tables have there."""
    if options.target == "hf":
        return hugging_face.sources_for(hugging_face.family_for(cfg), cfg), None
    step = options.vocab_divisor * options.tensor
    rows = math.ceil(cfg.vocab_size / step) * step
    stacked = options.target == "torch_dist"
    return megatron.sources(cfg, stacked=stacked, tensor=options.tensor), rows


def _mapped_writer(
    folder: Path, cfg: GPTConfig, opened: Opened, arrays: Mapping[str, Array], options: Options
) -> Writer:
    dtype = dtype_name(_dtype_of(opened))
    if options.target == "hf":
        copy_tokenizer(_tokenizer_folder(opened), folder)
        config = hugging_face.to_hf_config(cfg, dtype)
        return hf_writer(folder, arrays, config, shard_bytes=options.shard_bytes)
    state = any(name.startswith(STATE) for name in arrays)
    args = megatron.to_args(cfg, tensor=options.tensor, pipeline=options.pipeline)
    args |= {
        "padded_vocab_size": arrays[TABLE].shape[0],
        "make_vocab_size_divisible_by": options.vocab_divisor,
        "params_dtype": _dtype_of(opened),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "ckpt_format": "torch" if options.target == "megatron" else "torch_dist",
        "iteration": int(opened.extra.get("step", 0)),
        "consumed_train_samples": int(opened.extra.get("consumed", 0)),
        "use_distributed_optimizer": state,
    }
    iteration = args["iteration"]
    more = beside(opened.extra, str(opened.path), optimizer=state)
    if options.target == "torch_dist":
        if state:
            more["optimizer"]["param_state_sharding_type"] = RESHARDABLE
            more["content_metadata"] = CONTENT
        return TorchDistWriter(folder, arrays, args=args, iteration=iteration, more=more)
    tied = (TABLE, "output_layer.weight") if cfg.tied else None
    return LegacyWriter(
        folder,
        arrays,
        cut=megatron.CUT,
        args=args,
        iteration=iteration,
        more=more,
        tensor=options.tensor,
        pipeline=options.pipeline,
        tied=tied,
    )
