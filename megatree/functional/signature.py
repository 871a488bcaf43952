"""Signatures of ops: an op as a labelled contraction, from text such as "... d+, v d+ -> ... v"."""

from collections.abc import Sequence
from dataclasses import dataclass

Label = str | None
"""The name of a dim inside one op; None for a broadcast dim of size 1."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What an op does with the dims of its operands.

    A label is *free* (in the output), *sum* (contracted: cutting it gives a pending sum), *whole*
    (may not be cut) or *own* (the op itself communicates over it and returns the same value on all
    ranks).

    Args:
        operands: per operand, per dim, its label.
        outputs: per output, per dim, its label.
        sums, whole, own: the labels of these classes; all others are free. One that is owned and
            summed is owned by the value alone: gradients of operands without it are pending sums.
        linear: sets of operand positions in which the op is jointly linear. A pending sum passes
            if the operands that carry it are exactly one of these sets.
        product: whether the op is exactly the contraction that its labels spell.
    """

    operands: tuple[tuple[Label, ...], ...]
    outputs: tuple[tuple[Label, ...], ...]
    sums: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    product: bool = False


_MARKS = {"+": "sums", "!": "whole", "@": "own"}


def parse(text: str, ranks: Sequence[int], linear: Sequence[Sequence[int]] = ()) -> Signature:
    """Parse a signature for operands of the given ranks.

    Labels are words; "..." stands for leading dims, labelled "0", "1", ... from the left. A mark
    on a label gives its class: "+" sum, "!" whole, "@" own, "@+" own and sum (see `Signature`);
    "...+" sums all leading dims. A label that is in no output must carry a mark.

    Args:
        text: "operand, operand -> output, output".
        ranks: number of dims of each operand.
        linear: sets of operand positions in which the op is jointly linear.

    Raises:
        ValueError: the ranks do not fit the text, or a vanished label carries no mark.
    """
    left, right = text.split("->")
    classes: dict[str, set[str]] = {"sums": set(), "whole": set(), "own": set()}
    dots: int | None = None

    def words(part: str) -> list[str]:
        names = []
        for word in part.split():
            name = word.rstrip("".join(_MARKS))
            for mark in word[len(name) :]:
                classes[_MARKS[mark]].add(name)
            names.append(name)
        return names

    ins, outs = [words(p) for p in left.split(",")], [words(p) for p in right.split(",")]
    if len(ins) != len(ranks):
        raise ValueError(
            f"{text!r}: takes {len(ins)} operands, {len(ranks)} given. "
            "Give one operand per group of labels."
        )
    for names, rank in zip(ins, ranks, strict=True):
        if "..." in names:
            extra = rank - len(names) + 1
            if extra < 0 or dots not in (None, extra):
                raise ValueError(f"{text!r}: operands with {list(ranks)} dims do not fit.")
            dots = extra
        elif len(names) != rank:
            raise ValueError(f"{text!r}: operands with {list(ranks)} dims do not fit.")

    def expand(names: list[str]) -> tuple[str, ...]:
        out: list[str] = []
        for name in names:
            out += [str(i) for i in range(dots or 0)] if name == "..." else [name]
        return tuple(out)

    operands, outputs = tuple(map(expand, ins)), tuple(map(expand, outs))
    for labels in classes.values():
        if "..." in labels:
            labels.remove("...")
            labels.update(map(str, range(dots or 0)))
    gone = {x for names in operands for x in names} - {x for names in outputs for x in names}
    unmarked = sorted(gone - classes["sums"] - classes["whole"] - classes["own"])
    if unmarked:
        raise ValueError(
            f"{text!r}: {', '.join(unmarked)} vanishes. Mark it + (summed), ! (whole) or @ (own)."
        )
    return Signature(
        operands=operands,
        outputs=outputs,
        sums=frozenset(classes["sums"]),
        whole=frozenset(classes["whole"]),
        own=frozenset(classes["own"]),
        linear=tuple(frozenset(group) for group in linear),
    )
