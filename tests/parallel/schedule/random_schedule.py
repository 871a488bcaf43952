"""Valid schedules drawn at random: any order that the needs of the actions allow."""

from random import Random

from megatree.parallel.schedule import Action, Kind, Schedule, needs


def random_schedule(
    rng: Random, stage_rank: tuple[int, ...], num_microbatches: int, *, splits: bool = False
) -> Schedule:
    """Draw, over and over, any action whose needs are done; microbatches in any order too."""
    kinds: tuple[Kind, ...] = ("F", "B", "W") if splits else ("F", "B")
    stages, microbatches = range(len(stage_rank)), range(num_microbatches)
    todo = [Action(k, s, i) for k in kinds for s in stages for i in microbatches]
    done: set[Action] = set()
    rows: list[list[Action]] = [[] for _ in range(max(stage_rank) + 1)]
    while todo:
        ready = [a for a in todo if done.issuperset(needs(a, len(stage_rank)))]
        action = rng.choice(ready)
        todo.remove(action)
        done.add(action)
        rows[stage_rank[action.stage]].append(action)
    return Schedule(tuple(map(tuple, rows)), stage_rank)


def random_schedules(count: int, seed: int) -> list[Schedule]:
    """Draw schedules of several shapes: one stage a rank, interleaved, V, arbitrary placements."""
    rng = Random(seed)
    shapes = [((0, 1), 4), ((0, 1, 0, 1), 3), ((0, 1, 2), 4), ((0, 1, 2, 3, 0, 1, 2, 3), 2)]
    shapes += [((0, 1, 0, 1, 0, 1), 2), ((0, 1, 2, 2, 1, 0), 3), ((2, 0, 0, 1, 2), 3)]
    drawn = (rng.choice(shapes) for _ in range(count))
    return [random_schedule(rng, *shape, splits=rng.random() < 0.4) for shape in drawn]
