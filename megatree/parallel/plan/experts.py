"""What rows on their way to experts and back come to, from the bodies of a lowered program."""

import math
from dataclasses import dataclass

from megatree.parallel.bodies import run_body
from megatree.parallel.model import ModelProgram
from megatree.parallel.program import Program


@dataclass(frozen=True, kw_only=True)
class ExpertTraffic:
    """Bytes that leave a rank for other ranks, in one layer and microbatch.

    Args:
        unit: the layer's kind.
        layers: how many of them a rank of the busiest pipeline rank runs.
        axes: mesh axes of the experts.
        dispatch: to the experts, forward: rows, their gates, and how many there are.
        combine: back from them, forward.
        backward: both ways again.
        exact: whether it does not depend on the data: rows are padded to a capacity. Else loads
            are taken to be even, which is also the least that the busiest rank sends.
    """

    unit: str
    layers: int
    axes: tuple[str, ...]
    dispatch: int
    combine: int
    backward: int
    exact: bool

    @property
    def of_a_microbatch(self) -> int:
        """Bytes of all layers, forward and backward."""
        return self.layers * (self.dispatch + self.combine + self.backward)

    def __str__(self) -> str:
        sizes = [f"{n / 2**20:,.2f}" for n in (self.dispatch, self.combine, self.backward)]
        how = "rows padded to a capacity, exact" if self.exact else "even loads assumed"
        return (
            f"{self.unit}: {self.layers} layers over {' '.join(self.axes)}, each "
            f"{sizes[0]} MiB to the experts, {sizes[1]} back, {sizes[2]} in the backward ({how})"
        )


def expert_traffic(program: ModelProgram, rank: int) -> tuple[ExpertTraffic, ...]:
    """Return the traffic of every kind of layer with experts on a pipeline rank."""
    units = [
        name
        for (name, _, _), stage in zip(program.order, program.stages, strict=True)
        if program.stage_rank[stage] == rank
    ]
    found = (_of(name, program.units[name].program, units.count(name)) for name in program.units)
    return tuple(traffic for traffic in found if traffic is not None and traffic.layers)


def _of(name: str, program: Program, layers: int) -> ExpertTraffic | None:
    forward, backward, kinds, axes = [], 0, set(), ()
    for node in program.graph.nodes:
        if node.target is not run_body or node.meta["op"] != "local_map experts":
            continue
        for call in node.meta["calls"]:
            n = math.prod(program.mesh_sizes[axis] for axis in call.axes)
            leaves = call.bytes * (n - 1) // n
            axes = call.axes
            if call.phase == "forward":
                forward.append(leaves)
                kinds.add(call.kind)
            else:
                backward += leaves
    if not forward:
        return None
    return ExpertTraffic(
        unit=name,
        layers=layers,
        axes=axes,
        dispatch=sum(forward[:-1]),
        combine=forward[-1],
        backward=backward,
        exact="all_to_all_v" not in kinds,
    )
