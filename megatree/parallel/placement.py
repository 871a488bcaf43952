"""Which stage runs each layer of a chain, and which pipeline rank holds each stage: data."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatree.parallel.errors import ShardingError
from megatree.parallel.schedule.grid import grid


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Layer -> stage. Segments before a stack run with its first layer, the last ones with the
    last.

    Give one of the three:

    Args:
        num_stages: spread the layers evenly over this many stages.
        layers_per_stage: number of layers of every stage, in order; a stage may have none.
        stage_of_layer: stage of every layer, in order, never decreasing.
        embed_layers: with `num_stages`, how many layers the first segments count for.
        head_layers: with `num_stages`, how many layers the last segments count for.
    """

    num_stages: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    stage_of_layer: tuple[int, ...] | None = None
    embed_layers: int = 0
    head_layers: int = 0

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("num_stages", "layers_per_stage", "stage_of_layer")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"Placement: {' and '.join(given)} are given. Give one of them.")
        stages = self.stage_of_layer or ()
        if any(b < a or b > a + 1 for a, b in zip((0, *stages), stages, strict=False)):
            raise ValueError(
                f"Placement: stage_of_layer {stages} must start at 0 and never decrease or skip. "
                "Number the stages in the order of the layers."
            )

    def stages(self, is_layer: Sequence[bool], num_stages: int) -> tuple[int, ...]:
        """Return the stage of every link of a chain.

        Args:
            is_layer: per link in execution order, whether it is a layer of a stack.
            num_stages: number of stages that the schedule has.

        Raises:
            ShardingError: the placement does not fit the layers or the stages.
        """
        layers = sum(is_layer)
        per_stage = self._per_stage(layers, num_stages)
        if len(per_stage) != num_stages:
            short = len(per_stage) < num_stages
            marks = [(s, 0) for s in range(*sorted((len(per_stage), num_stages)))]
            rows = (*per_stage, *(0 for _ in marks)) if short else per_stage
            raise ShardingError(
                f"placement: has {len(per_stage)} stages, the schedule {num_stages}. "
                f"Give both the same number.\n{_grid(rows, marks)}"
            )
        if sum(per_stage) != layers:
            marks = _beyond(per_stage, layers)
            raise ShardingError(
                f"placement: {per_stage} places {sum(per_stage)} layers, the model has {layers}. "
                f"Make the counts add up.\n{_grid(per_stage, marks)}"
            )
        stage_of = [stage for stage, count in enumerate(per_stage) for _ in range(count)]
        out: list[int] = []
        at = 0
        for layer in is_layer:
            if layer:
                out.append(stage_of[at])
                at += 1
            elif at == 0:
                out.append(0)
            elif at == layers:
                out.append(num_stages - 1)
            else:
                out.append(stage_of[at])
        return tuple(out)

    def _per_stage(self, layers: int, num_stages: int) -> tuple[int, ...]:
        if self.layers_per_stage is not None:
            return self.layers_per_stage
        if self.stage_of_layer is not None:
            stages = self.stage_of_layer
            return tuple(stages.count(s) for s in range(max(num_stages, max(stages) + 1)))
        count = self.num_stages or num_stages
        total = layers + self.embed_layers + self.head_layers
        even = [total // count + (stage < total % count) for stage in range(count)]
        even[0] -= self.embed_layers
        even[-1] -= self.head_layers
        if min(even) < 0 or (count > layers and not self.embed_layers + self.head_layers):
            empty = [(stage, 0) for stage, n in enumerate(even) if n <= 0]
            raise ShardingError(
                f"placement: {layers} layers over {count} stages leaves a stage without layers "
                f"({even}). Use at most {layers} stages, or give layers_per_stage.\n"
                f"{_grid(even, empty)}"
            )
        return tuple(even)


def _beyond(per_stage: Sequence[int], layers: int) -> list[tuple[int, int]]:
    """Return the (stage, place) of layers that the model lacks, or where more should be."""
    cells = [(stage, place) for stage, n in enumerate(per_stage) for place in range(n)]
    return cells[layers:] or [(len(per_stage) - 1, per_stage[-1])]


def _grid(per_stage: Sequence[int], marked: Sequence[tuple[int, int]]) -> str:
    """Print the layers of every stage, some cells marked."""
    rows, first = [], 0
    for count in per_stage:
        rows.append([f"layer {first + n}" for n in range(max(count, 0))])
        first += max(count, 0)
    return grid(rows, marked, label="stage")
