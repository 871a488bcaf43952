"""The one planner: from any type to any type, each mesh axis in at most one collective."""

import itertools
from dataclasses import dataclass

from megatree.parallel.types import I, P, S, ShardType

COLLECTIVES = ("all_gather", "psum_scatter", "psum", "all_to_all")


@dataclass(frozen=True, slots=True)
class Step:
    """One primitive of a transition, over a tuple of mesh axes taken as one flattened axis.

    kind: "all_gather" and "psum_scatter" along `dim`; "psum"; "all_to_all" from `dim` to `to_dim`;
    "slice" along `dim`; "pad" `dim` with zeros around the own piece; "mask": keep coordinate 0.
    """

    kind: str
    axes: tuple[str, ...]
    dim: int = 0
    to_dim: int = 0

    @property
    def is_collective(self) -> bool:
        """Whether ranks talk in this step."""
        return self.kind in COLLECTIVES

    def __str__(self) -> str:
        over = ".".join(self.axes)
        where = {
            "psum": "",
            "mask": "",
            "all_to_all": f" dim {self.dim} -> {self.to_dim}",
        }.get(self.kind, f" dim {self.dim}")
        return f"{self.kind}({over}){where}"


def plan_move(src: ShardType, dst: ShardType) -> tuple[Step, ...]:
    """Plan the steps that turn a value of type `src` into one of type `dst`.

    Common prefixes of a dim's mesh axes stay. Suffixes leave innermost first, in runs of one fate:
    all-to-all if the run is next in line on its target dim, else all-gather, or zero-padding into a
    pending sum. Axes enter outer to inner: reduce-scatter where the value is a pending sum, else a
    slice. What is still pending is summed where the payload is smallest: last, or first if axes
    only leave. I and R are the same forward; they differ in the dual: the backward of
    `move(x, src, dst)` is `move(g, dst.dual, src.dual)`.

    Raises:
        AssertionError: the global shapes differ, or the orders of dims.
    """
    assert (src.shape, src.permuted) == (dst.shape, dst.permuted), f"{src} -> {dst}"
    current = [list(axes) for axes in src.spec]
    wanted = [list(axes) for axes in dst.spec]
    target = {axis: dim for dim, axes in enumerate(wanted) for axis in axes}
    state, goal = dict(src.kinds), dict(dst.kinds)
    keep = [_common_prefix(c, w) for c, w in zip(current, wanted, strict=True)]
    steps: list[Step] = []

    def fate(axis: str) -> str:
        return S if axis in target else P if goal[axis] == P else I

    def leave(dim: int, count: int, kind: str, to_dim: int = 0) -> list[str]:
        run = current[dim][len(current[dim]) - count :]
        del current[dim][len(current[dim]) - count :]
        steps.append(Step(kind, tuple(run), dim, to_dim))
        return run

    def step_out(dim: int) -> bool:
        """Take the innermost run of one fate off a dim; False if it waits for its target dim."""
        excess = len(current[dim]) - keep[dim]
        if excess == 0:
            return False
        last = current[dim][-1]
        end = fate(last)
        if end == S and target[last] != dim:
            to = target[last]
            if current[to] != wanted[to][: len(current[to])]:
                return False
            for count in range(excess, 0, -1):
                run = current[dim][-count:]
                at = len(current[to])
                if wanted[to][at : at + count] == run:
                    current[to] += leave(dim, count, "all_to_all", to)
                    keep[to] = len(current[to])
                    return True
            return False
        count = 1
        while count < excess and fate(current[dim][-count - 1]) == end:
            count += 1
        for axis in leave(dim, count, "pad" if end == P else "all_gather"):
            state[axis] = P if end == P else I
        return True

    while any(step_out(dim) for dim in range(len(current))):
        pass
    for dim in range(len(current)):  # what no all-to-all could serve
        if len(current[dim]) > keep[dim]:
            for axis in leave(dim, len(current[dim]) - keep[dim], "all_gather"):
                state[axis] = I
    for dim in range(len(current)):
        entering = wanted[dim][len(current[dim]) :]
        for pending, run in itertools.groupby(entering, key=lambda axis: state[axis] == P):
            steps.append(Step("psum_scatter" if pending else "slice", tuple(run), dim))
    uncut = [axis for axis in state if axis not in target]
    summed = tuple(axis for axis in uncut if state[axis] == P and goal[axis] != P)
    masked = tuple(axis for axis in uncut if state[axis] != P and goal[axis] == P)
    if summed:
        only_grows = set(target) < {axis for axes in src.spec for axis in axes}
        steps.insert(0 if only_grows else len(steps), Step("psum", summed))
    if masked:
        steps.append(Step("mask", masked))
    return tuple(steps)


def _common_prefix(a: list[str], b: list[str]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


def only_widens(src: ShardType, dst: ShardType) -> frozenset[str] | None:
    """Return the axes over which src -> dst is I -> R and nothing else; None if it does more."""
    if src.spec != dst.spec:
        return None
    changed = {a for (a, k), (_, m) in zip(src.kinds, dst.kinds, strict=True) if k != m}
    if all(src.state(a) == I and dst.state(a) == "R" for a in changed):
        return frozenset(changed)
    return None
