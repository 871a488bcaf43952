"""`megatree verify CKPT`: whether every byte of a checkpoint is what it should be."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from megatree.cli.convert import Source


@dataclass(frozen=True, kw_only=True)
class Verify:
    """What `megatree verify` takes.

    Args:
        checkpoint: a checkpoint, or a run's folder, whose latest is taken.
        from_: its format; "auto" looks.
        like: config.json of a run or of Hugging Face, where it does not say its model.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    from_: Annotated[Source, tyro.conf.arg(name="from")] = "auto"
    like: str = ""


ABOUT = "Read a checkpoint whole and compare its checksums; of other formats, sizes and names."


def main(args: list[str]) -> int:
    """Run the command; return 0 if the checkpoint is whole, else 1."""
    given = tyro.cli(Verify, prog="megatree verify", description=ABOUT, args=args)
    from megatree.recipes.formats import model_like, open_checkpoint
    from megatree.recipes.inspect import verify

    like = model_like(given.like) if given.like else None
    kind = None if given.from_ == "auto" else given.from_
    opened = open_checkpoint(given.checkpoint, kind, like=like)
    read = [0]

    def told(path: str, nbytes: int) -> None:
        read[0] += nbytes

    problems = verify(opened, told)
    for problem in problems:
        print(problem, file=sys.stderr)
    arrays = opened.reader.arrays
    checked = "checksums hold" if opened.format == "megatree" else "it has no checksums"
    if problems:
        print(f"{opened.path}: {len(problems)} of {len(arrays)} arrays are damaged")
        return 1
    print(f"{opened.path}: {len(arrays)} arrays, {read[0] / 1e6:,.1f} MB read, {checked}")
    return 0
