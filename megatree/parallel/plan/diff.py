"""What changes from one plan to another: memory, work and every collective, as rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatree.parallel.plan.plan import Plan, StagePlan

Part = Literal["layout", "memory", "work", "collectives"]

_What = tuple[str, str, str, str]
"""Phase, source line, kind and axes of a collective."""
_MEMORY = {
    "weights": "parameter_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "activations": "activation_bytes",
    "activations on the host": "offloaded_bytes",
    "made again in a backward": "again_bytes",
    "peak": "peak_bytes",
}
_PHASES = ("forward", "backward", "recompute", "sync", "step")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference between two plans.

    Args:
        part: what it is about.
        what: "peak of pipeline rank 0 (MiB)", "forward models/gpt.py:12 psum(tp)".
        before, after: as text; "-" where one of them has no such thing.
    """

    part: Part
    what: str
    before: str
    after: str


def differences(before: Plan, after: Plan) -> tuple[Change, ...]:
    """Return what changes between two plans; empty if nothing does.

    Collectives are matched by what they are (phase, source line, kind, axes), not by position, and
    come with the bytes that one rank moves in a step; pipeline ranks by their number.
    """
    rows = (*_layout(before, after), *_memory(before, after), *_collectives(before, after))
    return tuple(
        Change(part=part, what=what, before=old, after=new)
        for part, what, old, new in rows
        if old != new
    )


def _layout(a: Plan, b: Plan) -> Iterator[tuple[Part, str, str, str]]:
    yield "layout", "mesh", a.mesh, b.mesh
    yield "layout", "rules", a.rules or "-", b.rules or "-"
    for what, field in (("ranks", "num_ranks"), ("microbatches", "num_microbatches")):
        yield "layout", what, f"{getattr(a, field):,}", f"{getattr(b, field):,}"
    yield "work", "parameters", f"{a.num_params:,}", f"{b.num_params:,}"
    yield "work", "tokens a step", f"{a.tokens_per_step:,}", f"{b.tokens_per_step:,}"
    yield "work", "FLOPs a token", f"{a.flops_per_token:.4g}", f"{b.flops_per_token:.4g}"
    yield "work", "idle in the pipeline", f"{100 * a.bubble:.1f}%", f"{100 * b.bubble:.1f}%"


def _memory(a: Plan, b: Plan) -> Iterator[tuple[Part, str, str, str]]:
    for rank in range(max(len(a.stages), len(b.stages))):
        of = f" of pipeline rank {rank}" if max(len(a.stages), len(b.stages)) > 1 else ""
        old, new = (p.stages[rank] if rank < len(p.stages) else None for p in (a, b))
        for what, field in _MEMORY.items():
            yield "memory", f"{what}{of} (MiB)", _mib(old, field), _mib(new, field)
        live = [f"{s.live_microbatches:g}" if s else "-" for s in (old, new)]
        yield "memory", f"live microbatches{of}", live[0], live[1]


def _mib(stage: StagePlan | None, field: str) -> str:
    return "-" if stage is None else f"{getattr(stage, field) / 2**20:,.1f}"


def _collectives(a: Plan, b: Plan) -> Iterator[tuple[Part, str, str, str]]:
    old, new = _moved(a), _moved(b)
    for phase in _PHASES:
        yield "collectives", f"{phase}: all", _total(old, phase), _total(new, phase)
        for key in sorted({*old, *new}):
            if key[0] == phase:
                what = f"{key[0]} {key[1]} {key[2]}({key[3]})"
                yield "collectives", what, _spell(old.get(key)), _spell(new.get(key))


def _total(moved: dict[_What, tuple[int, int]], phase: str) -> str:
    found = [times_and_size for what, times_and_size in moved.items() if what[0] == phase]
    return _spell((sum(n for n, _ in found), sum(size for _, size in found)) if found else None)


def _moved(plan: Plan) -> dict[_What, tuple[int, int]]:
    """Return what a collective is -> (how often, bytes in all) in a step of one rank."""
    table: dict[_What, tuple[int, int]] = {}
    for c in plan.collectives:
        key = (c.phase, c.source, c.kind, ".".join(c.axes))
        times, size = table.get(key, (0, 0))
        table[key] = (times + c.count, size + c.count * c.bytes)
    return table


def _spell(moved: tuple[int, int] | None) -> str:
    return f"{moved[0]:,} x, {_size(moved[1])}" if moved else "-"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
