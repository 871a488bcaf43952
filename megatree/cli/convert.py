"""`megatree convert SRC DST`: a checkpoint of one format as one of another."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megatree.cli.columns import columns

Source = Literal["auto", "megatree", "hf", "meta", "megatron", "torch_dist", "dcp", "orbax"]
Target = Literal["megatree", "hf", "megatron", "torch_dist", "dcp", "orbax"]
Dtype = Literal["as-is", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """What `megatree convert` takes.

    Args:
        source: folder of the checkpoint: one step, or a run, whose latest is taken.
        target: folder to make.
        from_: format of the source; "auto" looks.
        to: format of the target.
        dry_run: print where every leaf goes, and what has no place; write nothing.
        like: config.json of a run or of Hugging Face, where the source does not say its model.
        dtype: of the weights; the optimizer's state keeps its own.
        weights_only: leave the optimizer's state out.
        tensor: tensor parallel ranks of --to megatron.
        pipeline: pipeline ranks of --to megatron.
        vocab_divisor: tables of Megatron get a multiple of this many rows, times --tensor.
        shard_mb: most MB of a safetensors file.
        box_mb: MB that are carried over at a time; some sixteen times as much is held.
    """

    source: Annotated[str, tyro.conf.Positional]
    target: Annotated[str, tyro.conf.Positional]
    from_: Annotated[Source, tyro.conf.arg(name="from")] = "auto"
    to: Target = "megatree"
    dry_run: bool = False
    like: str = ""
    dtype: Dtype = "as-is"
    weights_only: bool = False
    tensor: int = 1
    pipeline: int = 1
    vocab_divisor: int = 128
    shard_mb: int = 5120
    box_mb: int = 32


ABOUT = "Convert a checkpoint between formats, a box at a time: memory does not grow with it."


def main(args: list[str]) -> int:
    """Run the command; return the exit code."""
    given = tyro.cli(Convert, prog="megatree convert", description=ABOUT, args=args)
    import torch

    from megatree.recipes.convert import Options, convert, plan_conversion
    from megatree.recipes.formats import model_like

    options = Options(
        source=None if given.from_ == "auto" else given.from_,
        target=given.to,
        like=model_like(given.like) if given.like else None,
        dtype=None if given.dtype == "as-is" else getattr(torch, given.dtype),
        weights_only=given.weights_only,
        tensor=given.tensor,
        pipeline=given.pipeline,
        vocab_divisor=given.vocab_divisor,
        shard_bytes=given.shard_mb * 1_000_000,
        box_bytes=given.box_mb << 20,
    )
    plan = plan_conversion(given.source, options)
    if given.dry_run:
        _show(plan)
        return 0 if not (plan.unmapped or plan.opened.unmapped) else 1
    plan.refuse_unmapped()
    with _bar() as bar:
        task = bar.add_task("converts", total=plan.nbytes)

        def told(path: str, nbytes: int) -> None:
            bar.update(task, advance=nbytes, description=path)

        convert(given.source, given.target, options, told)
    arrays = plan.reader.arrays
    print(f"wrote {given.target}: {len(arrays)} arrays, {plan.nbytes / 1e6:,.1f} MB, {given.to}")
    return 0


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _show(plan: object) -> None:
    from megatree.recipes.convert import Plan

    assert isinstance(plan, Plan)
    table = []
    kinds = {path: array.dtype for path, array in plan.opened.reader.arrays.items()}
    rows = {row.path: row for row in plan.rows}
    for path, leaf in sorted(plan.opened.leaves.items()):
        head, _, bare = path.partition(".")
        if head == "opt":
            entry, _, bare = bare.partition(".")
            head = f"opt.{entry}"
        row = rows.get(bare) if head == "params" or head in plan.starts else None
        name, foreign, part = (path, leaf.axes, "") if path not in plan.unmapped else ("-", "", "")
        if row and path not in plan.unmapped:
            name = f"{plan.starts.get(head, '')}{row.name}"
            foreign, part = row.foreign, row.part
        kind = str(kinds[path]).removeprefix("torch.")
        table.append((path, leaf.axes, kind, name, foreign, part))
    headings = ("leaf", "axes", "dtype", "tensor of the other format", "its axes", "part")
    print(columns(headings, table))
    for name, why in plan.opened.left_out.items():
        print(f"left out: {name} ({why})")
    for name in plan.opened.unmapped:
        print(f"unmapped: {name} has no leaf")
    for name in plan.unmapped:
        print(f"unmapped: {name} has no place in the target")
    print(
        f"{len(plan.opened.leaves)} leaves, {len(plan.reader.arrays)} arrays, "
        f"{plan.nbytes / 1e6:,.1f} MB would be written"
    )
