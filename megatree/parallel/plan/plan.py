"""`plan`: one printable value that knows a run before it runs."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from megatree.functional.chain import Chain
from megatree.functional.param import logical_shape
from megatree.parallel.layout import PIPELINE, Layout
from megatree.parallel.model import ModelProgram, lower_model
from megatree.parallel.packing import Group, pack
from megatree.parallel.plan.activations import Activations
from megatree.parallel.plan.experts import ExpertTraffic, expert_traffic
from megatree.parallel.plan.flops import attention_flops, forward_flops, narrowest_product
from megatree.parallel.plan.stored import StoredBytes, storage_collectives, stored_bytes
from megatree.parallel.precision import Precision
from megatree.parallel.schedule import Schedule, timeline
from megatree.parallel.schedule.live import held


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
        phase: "forward", "backward", "recompute", "sync" or "step".
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
        parameter_bytes, gradient_bytes, optimizer_bytes: of the buffers, as storage cuts them.
        gathered_bytes: rows of weights and gradients that are whole at once while they are used.
        stored_whole: leaves that storage asks to cut further than the rules do, but none of whose
            dims divides.
        activation_bytes: what the backward of one microbatch keeps, all its stages together.
        offloaded_bytes: what of it waits on the host instead.
        plain_bytes: what it would be without recomputation or offload.
        again_bytes: most that a backward makes again, or brings back, at once.
        live_microbatches: most microbatches alive at once (stages counted as parts of one).
        peak_bytes: all of the above at the worst moment.
        flops: of one microbatch, forward, backward and recomputation.
        again_flops: the part of it that is recomputation.
        forward_flops: the part of it in the forward.
        attention_flops: the part of it in attention.
        narrowest_product: smallest extent of any of its products on this rank.
    """

    rank: int
    stages: tuple[int, ...]
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    stored_whole: tuple[str, ...]
    activation_bytes: int
    offloaded_bytes: int
    plain_bytes: int
    again_bytes: int
    live_microbatches: float
    peak_bytes: int
    flops: int
    again_flops: int
    forward_flops: int
    attention_flops: int
    narrowest_product: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a run before it runs.

    Args:
        mesh, rules, storage: the layout, as text.
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
        sequence_axes: mesh axes that cut sequences.
        experts: what travels to experts and back, per kind of layer.
        surveys: whether a forward of all microbatches goes before, to count choices of experts.
    """

    mesh: str
    mesh_sizes: tuple[tuple[str, int], ...]
    rules: str
    storage: str
    num_ranks: int
    num_params: int
    num_microbatches: int
    tokens_per_step: int
    flops_per_token: float
    stages: tuple[StagePlan, ...]
    collectives: tuple[PlannedCollective, ...]
    message_bytes: int
    bubble: float
    sequence_axes: tuple[str, ...] = ()
    experts: tuple[ExpertTraffic, ...] = ()
    surveys: bool = False

    @property
    def expert_bytes(self) -> int:
        """What a rank sends to the ranks of other experts, and back, in a step."""
        return self.num_microbatches * sum(
            e.of_a_microbatch + e.layers * (e.dispatch + e.combine) * self.surveys
            for e in self.experts
        )

    @property
    def context_bytes(self) -> int:
        """What a rank sends inside the model among the ranks of a sequence, in a step."""
        sizes, inside = dict(self.mesh_sizes), ("forward", "backward", "recompute")
        total = 0.0
        for c in self.collectives:
            if c.axes and set(c.axes) <= set(self.sequence_axes) and c.phase in inside:
                n = math.prod(sizes[axis] for axis in c.axes)
                share = {"ppermute": 1.0, "psum": 2 * (n - 1) / n}.get(c.kind, (n - 1) / n)
                total += c.bytes * c.count * share
        return round(total)

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
        head += f"; storage: {self.storage}" if self.storage != "whole" else ""
        stages = [
            f"  pipeline rank {s.rank}: {s.parameters:,} parameters; bytes: parameters "
            f"{s.parameter_bytes:,}, gradients {s.gradient_bytes:,}, optimizer "
            f"{s.optimizer_bytes:,}{_gathered(s)}, activations {s.activation_bytes:,} x "
            f"{s.live_microbatches:g}{_made_again(s)}; peak {s.peak_bytes:,}"
            for s in self.stages
        ]
        rows = [
            f"  {c.unit:<16} {c.source:<22} {c.kind:<14} {'.'.join(c.axes):<10} {c.bytes:>14,} B "
            f"x {c.count:<6} {c.phase}{' (overlappable)' if c.overlappable else ''}"
            for c in self.collectives
        ]
        traffic = [f"  experts: {e}" for e in self.experts]
        return "\n".join([head, *stages, *traffic, *rows])


def plan(
    model: Chain,
    layout: Layout,
    *,
    num_microbatches: int = 1,
    precision: Precision = Precision(),  # noqa: B008 (frozen)
    moments: Sequence[torch.dtype] = (torch.float32, torch.float32),
) -> Plan:
    """Plan a training step: memory, collectives and work, without processes or weights.

    Built from the same lowering that the runtime executes; the cost does not grow with the mesh.

    Args:
        model: a chain; its sizes are those of one microbatch over all ranks.
        layout: mesh, rules and storage, and with a pipeline its placement and schedule.
        num_microbatches: per step.
        precision: what is stored in which dtype.
        moments: dtypes of the optimizer's states per parameter; AdamW has two.

    Returns:
        A Plan: print it, compare it, turn it into JSON.

    Raises:
        ShardingError: the model cannot be typed under this layout.
    """
    program = lower_model(model, layout)
    schedule = layout.schedule_for(num_microbatches)
    activations = Activations(program)
    tokens = math.prod(logical_shape(next(iter(model.batch.values())), model.sizes, "batch"))
    flops = sum(
        3 * forward_flops(program.units[name].program, local=False) for name, _, _ in program.order
    )
    ranks = range(layout.num_stage_ranks)
    groups = [pack(program, stage_rank=rank) for rank in ranks]
    stages = tuple(
        _stage(
            program,
            schedule,
            rank,
            activations,
            groups[rank],
            stored_bytes(groups[rank], precision, moments),
        )
        for rank in ranks
    )
    surveys = bool(model.survey) and num_microbatches > 1
    if surveys:
        stages = tuple(replace(s, flops=s.flops + s.forward_flops) for s in stages)
    busiest = max(ranks, key=lambda rank: stages[rank].flops)
    sizes = layout.sizes
    return Plan(
        mesh=str(layout.mesh),
        mesh_sizes=tuple(layout.mesh.sizes.items()),
        rules=str(layout.rules),
        storage=str(layout.storage),
        num_ranks=layout.mesh.num_ranks,
        num_params=model.num_params,
        num_microbatches=num_microbatches,
        tokens_per_step=tokens * num_microbatches,
        flops_per_token=flops / tokens,
        stages=stages,
        collectives=tuple(
            sorted(
                [
                    *_collectives(
                        program,
                        schedule,
                        busiest,
                        num_microbatches,
                        activations,
                        groups[busiest],
                        surveys=surveys,
                    ),
                    *_storage(groups[busiest], precision, num_microbatches),
                ],
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
        sequence_axes=layout.axes("seq"),
        experts=expert_traffic(program, busiest),
        surveys=surveys,
    )


def _gathered(stage: StagePlan) -> str:
    """Print what storage gathers at once, and what it could not cut."""
    out = f", gathered {stage.gathered_bytes:,}" if stage.gathered_bytes else ""
    whole = ", ".join(stage.stored_whole[:8])
    return f"{out} (stored whole: {whole})" if whole else out


def _made_again(stage: StagePlan) -> str:
    """Print what recomputation and offload change."""
    out = f" (of {stage.plain_bytes:,})" if stage.again_bytes else ""
    out += f", {stage.offloaded_bytes:,} on the host" if stage.offloaded_bytes else ""
    return f"{out}, made again {stage.again_bytes:,}" if stage.again_bytes else out


def _entries(program: ModelProgram, rank: int) -> list[str]:
    """Return the unit of every entry that a pipeline rank runs."""
    return [
        name
        for (name, _, _), stage in zip(program.order, program.stages, strict=True)
        if program.stage_rank[stage] == rank
    ]


def _stage(
    program: ModelProgram,
    schedule: Schedule,
    rank: int,
    activations: Activations,
    groups: Sequence[Group],
    stored: StoredBytes,
) -> StagePlan:
    units = _entries(program, rank)
    stages = tuple(s for s, r in enumerate(program.stage_rank) if r == rank)
    live = max(now for _, now in held(schedule, rank, [1 / len(stages)] * schedule.num_stages))
    kept = [activations.of(stage) for stage in stages]
    here, again = sum(k.here for k in kept), max(k.again for k in kept)
    programs = [program.units[name].program for name in units]
    forward = sum(forward_flops(p, local=True) for p in programs)
    again_flops = sum(k.flops for k in kept)
    attention = 3 * sum(attention_flops(p, local=True) for p in programs)
    static = stored.params + stored.grads + stored.opt + stored.gathered
    asked = set(program.layout.stored.opt)
    return StagePlan(
        rank=rank,
        stages=stages,
        parameters=sum(g.num_rows * g.row_size for g in groups),
        parameter_bytes=stored.params,
        gradient_bytes=stored.grads,
        optimizer_bytes=stored.opt,
        gathered_bytes=stored.gathered,
        stored_whole=tuple(
            leaf.path
            for g in groups
            if g.trained and not g.stored
            for leaf in g.leaves
            if asked & {axis for axis, _ in program.types[leaf.path].kinds}
        ),
        activation_bytes=here,
        offloaded_bytes=sum(k.away for k in kept),
        plain_bytes=sum(k.plain for k in kept),
        again_bytes=again,
        live_microbatches=round(live, 6),
        peak_bytes=static + int(here * live) + again,
        flops=3 * forward + again_flops,
        again_flops=again_flops,
        forward_flops=forward,
        attention_flops=attention + sum(k.attention_flops for k in kept),
        narrowest_product=min(
            (n for name in set(units) if (n := narrowest_product(program.units[name].program))),
            default=0,
        ),
    )


def _storage(
    groups: Sequence[Group], precision: Precision, num_microbatches: int
) -> Iterator[PlannedCollective]:
    """Yield the reductions into storage and the gathers out of it."""
    for group in groups:
        for c in storage_collectives(group, precision, num_microbatches) if group.stored else ():
            yield PlannedCollective(
                unit="gradient sync" if c.kind != "all_gather" else "weights",
                source=c.source,
                kind=c.kind,
                axes=c.axes,
                bytes=c.bytes,
                count=c.count,
                phase=c.phase,
                overlappable=True,
            )


def _bubble(schedule: Schedule) -> float:
    return timeline(schedule).bubble if schedule.num_ranks > 1 else 0.0


def _collectives(
    program: ModelProgram,
    schedule: Schedule,
    rank: int,
    num_microbatches: int,
    activations: Activations,
    groups: Sequence[Group],
    *,
    surveys: bool,
) -> Iterator[PlannedCollective]:
    """Yield what one rank of a pipeline rank does in a step, beside what storage does."""
    times = Counter(_entries(program, rank))
    cut = {leaf.path for group in groups if group.stored for leaf in group.leaves}
    for name, unit in program.units.items():
        for c in unit.program.collectives:
            sync = c.phase == "sync"
            if times[name] and not (sync and unit.leaves[c.source.removeprefix("w.")] in cut):
                yield PlannedCollective(
                    unit="gradient sync" if sync else name,
                    source=unit.leaves[c.source.removeprefix("w.")] if sync else c.source,
                    kind=c.kind,
                    axes=c.axes,
                    bytes=c.bytes,
                    count=times[name]
                    * (1 if sync else num_microbatches)
                    * (2 if surveys and c.phase == "forward" else 1),
                    phase=c.phase,
                    overlappable=sync,
                )
    repeated = Counter(
        call
        for stage, holder in enumerate(program.stage_rank)
        if holder == rank
        for call in activations.of(stage).collectives
    )
    for (name, c), times_again in repeated.items():
        yield PlannedCollective(
            unit=name,
            source=c.source,
            kind=c.kind,
            axes=c.axes,
            bytes=c.bytes,
            count=times_again * num_microbatches,
            phase="recompute",
            overlappable=False,
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
