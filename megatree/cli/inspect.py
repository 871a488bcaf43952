"""`megatree inspect CKPT`: what is in a checkpoint of any format, and how two differ."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from megatree.cli.columns import columns
from megatree.cli.convert import Source


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What `megatree inspect` takes.

    Args:
        checkpoint: a checkpoint, or a run's folder, whose latest is taken.
        against: another one, of any format: print what differs.
        from_: format of the checkpoint; "auto" looks.
        like: config.json of a run or of Hugging Face, where a checkpoint does not say its model.
        every_box: spell every box out.
        values: compare elements, not only shapes and dtypes.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    against: str = ""
    from_: Annotated[Source, tyro.conf.arg(name="from")] = "auto"
    like: str = ""
    every_box: bool = False
    values: bool = True


ABOUT = "Print the tree of a checkpoint: axes, dtypes, sizes, boxes; or what differs between two."


def main(args: list[str]) -> int:
    """Run the command; return 0, or 1 if two checkpoints differ."""
    given = tyro.cli(Inspect, prog="megatree inspect", description=ABOUT, args=args)
    from megatree.recipes.formats import model_like, open_checkpoint
    from megatree.recipes.inspect import differences, lines

    like = model_like(given.like) if given.like else None
    kind = None if given.from_ == "auto" else given.from_
    opened = open_checkpoint(given.checkpoint, kind, like=like)
    if given.against:
        other = open_checkpoint(given.against, like=like)
        found = list(differences(opened, other, values=given.values))
        for difference in found:
            print(f"{difference.path}: {difference.what}")
        print(f"{len(found)} of {len({*opened.leaves, *other.leaves})} leaves differ")
        return 1 if found else 0
    table = []
    total = 0
    for line in lines(opened, every_box=given.every_box):
        size = f"{line.nbytes / 1e6:,.3f}"
        shape = " ".join(map(str, line.shape))
        table.append((line.path, line.axes, line.dtype, shape, size, line.boxes))
        total += line.nbytes
    print(f"{opened.path}: {opened.format}")
    print(columns(("leaf", "axes", "dtype", "shape", "MB", "boxes"), table))
    for key, value in opened.extra.items():
        text = str(value)
        print(f"{key}: {text if len(text) <= 200 else text[:200] + ' ...'}")
    for name in opened.unmapped:
        print(f"unmapped: {name} has no leaf")
    print(f"{len(opened.leaves)} leaves, {total / 1e6:,.1f} MB")
    return 0
