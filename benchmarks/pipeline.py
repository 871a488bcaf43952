"""Bubble and memory of the pipeline schedules, from the timeline: no process runs.

Durations are the field's unit, F = B = W of a rank's whole model part, so that a schedule with
several stages a rank has shorter ones and all have the same work. `live` is the most that any rank
holds, in microbatches of a whole rank.
"""

import argparse
from collections.abc import Callable

from benchmarks.pairs import report
from megatree.parallel.schedule import (
    Costs,
    Schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    peak_live,
    timeline,
    validate,
    zero_bubble_h1,
    zero_bubble_v,
)

SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved, v=2": lambda p, m: interleaved(p, m, 2),
    "interleaved, v=4": lambda p, m: interleaved(p, m, 4),
    "zb-h1": zero_bubble_h1,
    "zb-v": zero_bubble_v,
}


def bubble_and_live(schedule: Schedule) -> tuple[float, float]:
    """Return the idle fraction of all ranks' time, and the most microbatches that a rank holds."""
    validate(schedule)
    part = schedule.num_ranks / schedule.num_stages
    times = timeline(schedule, Costs(forward=part, input_grad=part, weight_grad=part))
    return times.bubble, max(peak_live(schedule, [part] * schedule.num_stages))


def main() -> None:
    """Print a table per number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, 2, 4, 8], help="m / p")
    args = parser.parse_args()
    for p in args.ranks:
        counts = [p * rounds for rounds in args.rounds]
        print(f"pp={p:<3} bubble (live)  " + "".join(f"{f'm={m}':>16}" for m in counts))
        for name, generate in SCHEDULES.items():
            results = [bubble_and_live(generate(p, m)) for m in counts]
            cells = "".join(f"{bubble:>9.1%} {f'({live:g})':>6}" for bubble, live in results)
            print(f"  {name:<19}{cells}")
            for m, (bubble, live) in zip(counts, results, strict=True):
                report(
                    "bubble",
                    schedule=name,
                    ranks=p,
                    microbatches=m,
                    bubble=bubble,
                    live=float(live),
                )


if __name__ == "__main__":
    main()
