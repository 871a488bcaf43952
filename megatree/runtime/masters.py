"""Float32 masters in a checkpoint and in a run: what is taken from what, where one has them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from megatree.io.checkpoint import Piece
from megatree.parallel.packing import Group

MASTER = "opt.master"
"""Where masters are in a checkpoint."""

How: TypeAlias = Literal["plain", "narrow", "widen", "round", "masters", "drop"]

_TOLD: dict[How, str] = {
    "narrow": "are rounded from the masters of the checkpoint",
    "widen": "have masters that begin as the stored parameters, which had none",
    "round": "have masters that begin as the stored float32 parameters, and are rounded from them",
    "masters": "are the masters of the checkpoint",
    "drop": "lose the masters of the checkpoint, as asked",
}


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The dtypes of a parameter, and of its master if there is one, in a checkpoint or a run."""

    param: torch.dtype | None
    master: torch.dtype | None


def how(stored: Sides, run: Sides) -> How:
    """Return how a parameter of a run comes out of a checkpoint, without a loss if there is a way.

    | checkpoint | run | |
    |---|---|---|
    | with masters | with masters of the same dtype | both are read; a parameter in another narrow \
dtype is rounded from its master ("narrow") |
    | without | with | "widen": the master begins as the parameter; a stored parameter in the \
master's dtype is read as the master, and the parameter is rounded from it ("round") |
    | with | without | a parameter in the masters' dtype is read from them ("masters"), else they \
are lost ("drop") |
    | without | without | both have one dtype |

    Whatever is none of these is "plain", and refused by a strict load where dtypes differ.
    """
    if run.master is not None:
        if stored.master == run.master:
            return "plain" if stored.param == run.param else "narrow"
        if stored.master is None and stored.param == run.param:
            return "widen"
        return "round" if stored.master is None and stored.param == run.master else "plain"
    if stored.master is None:
        return "plain"
    if stored.master == run.param:
        return "masters"
    return "drop" if stored.param == run.param else "plain"


class Takes:
    """What a run takes of the parameters in a checkpoint, leaf by leaf (see `how`).

    Args:
        stored: path -> dtype of all leaves of the checkpoint.
        run: path of a parameter -> its dtypes in the run, for the parameters of all ranks.
    """

    def __init__(self, stored: Mapping[str, torch.dtype], run: Mapping[str, Sides]) -> None:
        def there(path: str) -> Sides:
            return Sides(param=stored.get(f"params.{path}"), master=stored.get(f"{MASTER}.{path}"))

        self.by_leaf: dict[str, How] = {path: how(there(path), run[path]) for path in run}

    @property
    def unused(self) -> tuple[str, ...]:
        """Leaves of the checkpoint that nobody reads."""
        unread: dict[How, str] = {"narrow": "params", "masters": "params", "drop": MASTER}
        return tuple(
            f"{unread[kind]}.{path}" for path, kind in self.by_leaf.items() if kind in unread
        )

    @property
    def lost(self) -> tuple[str, ...]:
        """Masters of the checkpoint that the run has no place for."""
        return tuple(f"{MASTER}.{path}" for path, kind in self.by_leaf.items() if kind == "drop")

    def told(self) -> str:
        """Say what is not plain."""
        counts = Counter(self.by_leaf.values())
        return "; ".join(
            f"{counts[kind]} parameters {text}" for kind, text in _TOLD.items() if counts[kind]
        )

    def routed(self, params: Iterable[Piece], masters: Iterable[Piece]) -> Iterator[Piece]:
        """Yield what is read of the pieces of parameters and masters, from where it is."""
        for piece in params:
            path = piece.path.removeprefix("params.")
            kind = self.by_leaf.get(path, "plain")
            if kind == "masters":
                yield replace(piece, path=f"{MASTER}.{path}")
            elif kind not in ("narrow", "round"):
                yield piece
        for piece in masters:
            path = piece.path.removeprefix(f"{MASTER}.")
            kind = self.by_leaf.get(path, "plain")
            if kind == "round":
                yield replace(piece, path=f"params.{path}")
            elif kind != "widen":
                yield piece

    @torch.no_grad()
    def finish(
        self,
        groups: Sequence[Group],
        shards: Mapping[str, Tensor],
        master: Mapping[str, Tensor],
    ) -> None:
        """Make what was not read out of what was, in place."""
        for group in groups:
            if group.name not in master:
                continue
            narrow, wide = group.pieces(shards[group.name]), group.pieces(master[group.name])
            for (leaf, _, low), (_, _, high) in zip(narrow, wide, strict=True):
                kind = self.by_leaf.get(leaf.path, "plain")
                if kind == "widen":
                    high.copy_(low)
                elif kind in ("narrow", "round"):
                    low.copy_(high)
