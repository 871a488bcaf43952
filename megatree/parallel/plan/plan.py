"""`plan`: one printable value that knows a run before it runs."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from megatree.functional.chain import Chain
from megatree.functional.param import logical_shape
from megatree.parallel.layout import PIPELINE, Layout
from megatree.parallel.model import ModelProgram, lower_model
from megatree.parallel.plan.activations import SavedBytes, saved_bytes
from megatree.parallel.plan.flops import attention_flops, forward_flops, narrowest_product
from megatree.parallel.schedule import Schedule, timeline


@dataclass(frozen=True, kw_only=True)
class PlannedCollective:
    """A collective of a step, on one rank of the pipeline rank that does it most often.

    Args:
        unit: program it belongs to ("blocks.dense", "gradient sync", "step").
        source: line of the user's program, or the leaf.
        kind: "psum", "all_gather", ...
        axes: mesh axes.
        bytes: of one rank's larger side.
        count: how often per step.
        phase: "forward", "backward", "sync" or "step".
        overlappable: whether it may run under compute (gradient syncs and messages do).
    """

    unit: str
    source: str
    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    phase: str
    overlappable: bool


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Memory and work of one rank of a pipeline rank.

    Args:
        rank: pipeline rank.
        stages: the stages it holds.
        parameters: elements on this rank, padding included.
        parameter_bytes, gradient_bytes, optimizer_bytes: of the buffers.
        activation_bytes: what the backward of one microbatch keeps, all its stages together.
        live_microbatches: most microbatches alive at once (stages counted as parts of one).
        peak_bytes: all of the above at the worst moment.
        flops: of one microbatch, forward and backward.
        attention_flops: the part of it in attention.
        narrowest_product: smallest extent of any of its products on this rank.
    """

    rank: int
    stages: tuple[int, ...]
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    live_microbatches: float
    peak_bytes: int
    flops: int
    attention_flops: int
    narrowest_product: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a run before it runs.

    Args:
        mesh, rules: the layout, as text.
        mesh_sizes: (mesh axis, size), outer to inner.
        num_ranks: ranks of the mesh.
        num_params: learned elements of the model, padding excluded.
        num_microbatches: per step.
        tokens_per_step: elements of the batch's first entry, all microbatches.
        flops_per_token: forward and backward of the model (products and attention, causal half;
            backward twice the forward; no recomputation).
        stages: per pipeline rank.
        collectives: per step, the largest first.
        message_bytes: of one message between stages (0 without a pipeline).
        bubble: fraction of time that a rank of the pipeline idles with unit costs.
    """

    mesh: str
    mesh_sizes: tuple[tuple[str, int], ...]
    rules: str
    num_ranks: int
    num_params: int
    num_microbatches: int
    tokens_per_step: int
    flops_per_token: float
    stages: tuple[StagePlan, ...]
    collectives: tuple[PlannedCollective, ...]
    message_bytes: int
    bubble: float

    @property
    def peak_bytes(self) -> int:
        """The most that any rank holds."""
        return max(stage.peak_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, object]:
        """Return the plan as plain values, for JSON and for a diff."""
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"{self.num_params:,} parameters on {self.num_ranks} ranks ({self.mesh}); "
            f"{self.num_microbatches} microbatches, {self.tokens_per_step:,} tokens a step, "
            f"{self.flops_per_token:.4g} FLOPs a token"
        )
        stages = [
            f"  pipeline rank {s.rank}: {s.parameters:,} parameters; bytes: parameters "
            f"{s.parameter_bytes:,}, gradients {s.gradient_bytes:,}, optimizer "
            f"{s.optimizer_bytes:,}, activations {s.activation_bytes:,} x {s.live_microbatches:g}; "
            f"peak {s.peak_bytes:,}"
            for s in self.stages
        ]
        rows = [
            f"  {c.unit:<16} {c.source:<22} {c.kind:<14} {'.'.join(c.axes):<10} {c.bytes:>14,} B "
            f"x {c.count:<6} {c.phase}{' (overlappable)' if c.overlappable else ''}"
            for c in self.collectives
        ]
        return "\n".join([head, *stages, *rows])


def plan(model: Chain, layout: Layout, *, num_microbatches: int = 1) -> Plan:
    """Plan a training step with AdamW: memory, collectives and work, without processes or weights.

    Built from the same lowering that the runtime executes; the cost does not grow with the mesh.

    Args:
        model: a chain; its sizes are those of one microbatch over all ranks.
        layout: mesh and rules, and with a pipeline its placement and schedule.
        num_microbatches: per step.

    Returns:
        A Plan: print it, compare it, turn it into JSON.

    Raises:
        ShardingError: the model cannot be typed under this layout.
    """
    program = lower_model(model, layout)
    schedule = layout.schedule_for(num_microbatches)
    saved = {
        name: saved_bytes(unit.program, num_carry_out=unit.num_carry)
        for name, unit in program.units.items()
    }
    tokens = math.prod(logical_shape(next(iter(model.batch.values())), model.sizes, "batch"))
    flops = sum(
        3 * forward_flops(program.units[name].program, local=False) for name, _, _ in program.order
    )
    ranks = range(layout.num_stage_ranks)
    stages = tuple(_stage(program, schedule, rank, saved) for rank in ranks)
    busiest = max(ranks, key=lambda rank: stages[rank].flops)
    sizes = layout.sizes
    return Plan(
        mesh=str(layout.mesh),
        mesh_sizes=tuple(layout.mesh.sizes.items()),
        rules=str(layout.rules),
        num_ranks=layout.mesh.num_ranks,
        num_params=model.num_params,
        num_microbatches=num_microbatches,
        tokens_per_step=tokens * num_microbatches,
        flops_per_token=flops / tokens,
        stages=stages,
        collectives=tuple(
            sorted(
                _collectives(program, schedule, busiest, num_microbatches),
                key=lambda c: -c.bytes * c.count,
            )
        ),
        message_bytes=max(
            (
                sum(math.prod(ty.local_shape(sizes)) * ty.dtype.itemsize for ty in types)
                for types in (program.carry_types(s) for s in range(len(program.stage_rank) - 1))
            ),
            default=0,
        ),
        bubble=_bubble(schedule),
    )


def _entries(program: ModelProgram, rank: int) -> list[str]:
    """Return the unit of every entry that a pipeline rank runs."""
    return [
        name
        for (name, _, _), stage in zip(program.order, program.stages, strict=True)
        if program.stage_rank[stage] == rank
    ]


def _stage(
    program: ModelProgram, schedule: Schedule, rank: int, saved: dict[str, SavedBytes]
) -> StagePlan:
    sizes = program.layout.sizes
    held: set[tuple[str, int | None]] = set()
    for (name, index, _), stage in zip(program.order, program.stages, strict=True):
        if program.stage_rank[stage] == rank:
            held |= {
                (path, index if path.startswith(f"{name}.") else None)
                for path in program.units[name].leaves.values()
            }
    local = [
        (math.prod(program.types[path].local_shape(sizes)), program.types[path].dtype)
        for path, _ in held
    ]
    parameter_bytes = sum(n * dtype.itemsize for n, dtype in local)
    gradient_bytes = sum(n * torch.promote_types(d, torch.float32).itemsize for n, d in local)
    masters = sum(n * 4 for n, dtype in local if dtype.itemsize < 4)
    units = _entries(program, rank)
    kept = sum(saved[name].activations + saved[name].carry for name in units)
    live = _live(schedule, rank)
    flops = 3 * sum(forward_flops(program.units[name].program, local=True) for name in units)
    static = parameter_bytes + gradient_bytes + 2 * gradient_bytes + masters
    return StagePlan(
        rank=rank,
        stages=tuple(s for s, r in enumerate(program.stage_rank) if r == rank),
        parameters=sum(n for n, _ in local),
        parameter_bytes=parameter_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=2 * gradient_bytes + masters,
        activation_bytes=kept,
        live_microbatches=live,
        peak_bytes=static + int(kept * live),
        flops=flops,
        attention_flops=3
        * sum(attention_flops(program.units[name].program, local=True) for name in units),
        narrowest_product=min(
            (n for name in set(units) if (n := narrowest_product(program.units[name].program))),
            default=0,
        ),
    )


def _live(schedule: Schedule, rank: int) -> float:
    """Return the most stages of microbatches alive at once, in units of a rank's whole part."""
    alive = most = 0
    for action in schedule.ranks[rank]:
        alive += {"F": 1, "B": -1, "W": 0}[action.kind]
        most = max(most, alive)
    return most / max(1, schedule.stage_rank.count(rank))


def _bubble(schedule: Schedule) -> float:
    return timeline(schedule).bubble if schedule.num_ranks > 1 else 0.0


def _collectives(
    program: ModelProgram, schedule: Schedule, rank: int, num_microbatches: int
) -> Iterator[PlannedCollective]:
    """Yield what one rank of a pipeline rank does in a step."""
    times = Counter(_entries(program, rank))
    for name, unit in program.units.items():
        for c in unit.program.collectives:
            if times[name]:
                sync = c.phase == "sync"
                yield PlannedCollective(
                    unit="gradient sync" if sync else name,
                    source=unit.leaves[c.source.removeprefix("w.")] if sync else c.source,
                    kind=c.kind,
                    axes=c.axes,
                    bytes=c.bytes,
                    count=times[name] * (1 if sync else num_microbatches),
                    phase=c.phase,
                    overlappable=sync,
                )
    axes = tuple(program.layout.mesh.sizes)
    if axes:
        yield PlannedCollective(
            unit="step",
            source="gradient norm",
            kind="psum",
            axes=axes,
            bytes=8,
            count=1,
            phase="step",
            overlappable=False,
        )
    if PIPELINE in program.layout.mesh.sizes:
        sends = [a for a in schedule.ranks[rank] if a.kind != "W"]
        yield PlannedCollective(
            unit="pipeline",
            source="carry",
            kind="send",
            axes=(PIPELINE,),
            bytes=sum(
                math.prod(ty.local_shape(program.layout.sizes)) * ty.dtype.itemsize
                for ty in program.carry_types(0)
            ),
            count=len(sends),
            phase="forward",
            overlappable=True,
        )
