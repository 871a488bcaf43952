"""The one typing rule: what each mesh axis does to a labelled contraction."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatree.functional.signature import Label, Signature
from megatree.parallel.types import I, P, R, ShardType


@dataclass(frozen=True)
class Inference:
    """The typing of one op.

    Args:
        replicate: per operand, the mesh axes over which it goes from I to R.
        specs: per output, what cuts each dim.
        kinds: state of the outputs on the mesh axes that cut none of their dims.
        permuted: per output, the dims that lie in the layout's order.
    """

    replicate: tuple[frozenset[str], ...]
    specs: tuple[tuple[tuple[str, ...], ...], ...]
    kinds: Mapping[str, str]
    permuted: tuple[tuple[int, ...], ...] = ()


class Refusal(Exception):  # noqa: N818 (an answer of the engine, not a failure)
    """An op that may not be applied to operands of these types."""

    def __init__(self, why: str, fix: str, *, pending: tuple[int, str] | None = None) -> None:
        super().__init__(why)
        self.why, self.fix, self.pending = why, fix, pending


def infer(
    sig: Signature,
    operands: Sequence[ShardType],
    mesh_axes: Iterable[str],
    *,
    any_order: bool = False,
) -> Inference:
    """Type an op from its signature and its operands' types.

    Per mesh axis: if it cuts a label, operands with that label must agree, operands without it go
    I -> R, and a pending sum over it is refused; the outputs are cut, a pending sum (the label is
    summed) or the same on all ranks (the op owns the label; operands without it then stay I, or go
    I -> R where the label is also summed: the op's backward leaves them pending sums). If it cuts
    nothing: all I gives I, any R gives R, and a pending sum passes through linear positions only.

    Args:
        sig: the op's signature, with as many operands as given.
        operands: the operands' types.
        mesh_axes: the mesh axes larger than 1, in mesh order.
        any_order: whether the op gives the same for any order of the elements of whole dims.

    Raises:
        Refusal: the operands' types do not allow the op.
    """
    cuts = _cuts(sig, operands)
    owner = {axis: label for label, axes in cuts.items() for axis in axes}
    replicate: list[set[str]] = [set() for _ in operands]
    kinds: dict[str, str] = {}
    free = [set(labels) for labels in sig.outputs]
    for axis in mesh_axes:
        states = [ty.state(axis) for ty in operands]
        label = owner.get(axis)
        if label is not None:
            for i, state in enumerate(states):
                if state == P:
                    raise Refusal(
                        f"operand {i} ({operands[i]}) is a pending sum over mesh axis {axis!r}, "
                        f"which cuts {label!r} of another operand",
                        "Insert shard(x, ...) where the sum is made",
                        pending=(i, axis),
                    )
                if label in sig.own and label not in sig.sums:
                    if state == R:
                        raise Refusal(
                            f"operand {i} ({operands[i]}) is used differently by the ranks of "
                            f"{axis!r}, over which this op communicates",
                            "Insert shard(x, ...) before it",
                        )
                elif state == I:
                    replicate[i].add(axis)
            kept = [label in labels for labels in free]
            if any(kept) and not all(kept):
                raise Refusal(
                    f"label {label!r} is cut over mesh axis {axis!r}, and output "
                    f"{kept.index(False)} does not have it, while another output has",
                    f"Mark {label!r} ! in the signature, or declare two ops",
                )
            if not any(kept):
                kinds[axis] = I if label in sig.own else P
        elif P in states:
            pending = frozenset(i for i, state in enumerate(states) if state == P)
            if pending not in sig.linear:
                first = min(pending)
                raise Refusal(
                    f"operand {first} ({operands[first]}) is a pending sum over mesh axis "
                    f"{axis!r}, and the op is not linear in it here",
                    "Insert shard(x, ...) between the two, so that the sum is finished",
                    pending=(first, axis),
                )
            for i, state in enumerate(states):
                if state == I:
                    replicate[i].add(axis)
            kinds[axis] = P
        elif R in states:
            for i, state in enumerate(states):
                if state == I:
                    replicate[i].add(axis)
            kinds[axis] = R
    specs = tuple(
        tuple(cuts.get(label, ()) if label is not None else () for label in labels)
        for labels in sig.outputs
    )
    ordered = _permuted(sig, operands, any_order=any_order)
    permuted = tuple(
        tuple(d for d, label in enumerate(labels) if label in ordered) for labels in sig.outputs
    )
    return Inference(tuple(map(frozenset, replicate)), specs, kinds, permuted)


def _permuted(
    sig: Signature, operands: Sequence[ShardType], *, any_order: bool
) -> frozenset[Label]:
    """Return the labels whose elements lie in the layout's order; operands must agree."""
    if not any(ty.permuted for ty in operands):
        return frozenset()
    order: dict[Label, tuple[bool, int]] = {}
    for i, (labels, ty) in enumerate(zip(sig.operands, operands, strict=True)):
        for dim, label in enumerate(labels):
            mine = dim in ty.permuted
            if mine and (label is None or (label in sig.whole and not any_order)):
                raise Refusal(
                    f"operand {i} ({ty}) is in zigzag order on dim {dim}, and the op looks at the "
                    "order of that dim",
                    "Insert shard(x, ...) with a whole axis there (of a name that has no order)",
                )
            if label is None:
                continue
            known, first = order.setdefault(label, (mine, i))
            if known != mine:
                raise Refusal(
                    f"dim {label!r} is in {_order_name(known)} order in operand {first} "
                    f"({operands[first]}) and in {_order_name(mine)} order in operand {i} ({ty})",
                    "Lay both out alike with shard(x, ...)",
                )
    return frozenset(label for label, (permuted, _) in order.items() if permuted)


def _order_name(permuted: bool) -> str:
    return "zigzag" if permuted else "natural"


def _cuts(sig: Signature, operands: Sequence[ShardType]) -> dict[str, tuple[str, ...]]:
    """Return label -> the mesh axes that cut it; operands must agree."""
    cuts: dict[str, tuple[str, ...]] = {}
    first: dict[str, int] = {}
    taken: dict[str, Label] = {}
    for i, (labels, ty) in enumerate(zip(sig.operands, operands, strict=True)):
        for dim, (label, axes) in enumerate(zip(labels, ty.spec, strict=True)):
            if label is None or label in sig.whole:
                if axes:
                    raise Refusal(
                        f"operand {i} ({ty}) is cut on dim {dim} over {axes}, and the op "
                        f"needs that "
                        "dim whole",
                        "Insert shard(x, ...) with a whole axis there",
                    )
                continue
            if label in cuts and cuts[label] != axes:
                raise Refusal(
                    f"dim {label!r} is cut over {cuts[label] or 'nothing'} in operand "
                    f"{first[label]} "
                    f"({operands[first[label]]}) and over {axes or 'nothing'} in operand "
                    f"{i} ({ty})",
                    "Lay both out alike with shard(x, ...) or in rules",
                )
            cuts[label] = axes
            first.setdefault(label, i)
    for label, axes in cuts.items():
        for axis in axes:
            if taken.setdefault(axis, label) != label:
                raise Refusal(
                    f"mesh axis {axis!r} cuts two dims of the op, {taken[axis]!r} and {label!r} "
                    f"({', '.join(map(str, operands))})",
                    "Map one of the two logical axes to other mesh axes in rules, or shard one "
                    "operand first",
                )
    return cuts
