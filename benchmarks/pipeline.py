"""What a pipeline costs: idle time and memory of the schedules, and the executor's bookkeeping.

Idle time and memory come from the timeline: no process runs. Durations are the field's unit,
F = B = W of a rank's whole model part, so that a schedule with several stages a rank has shorter
ones and all have the same work. `live` is the most that any rank holds, in microbatches of a whole
rank.

Bookkeeping is the executor's time less that of a straight loop over the same programs, the same
backwards and the same messages, per action. One rank of the pipeline runs alone; its messages come
from a comm that hands out tensors made before.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.pairs import interleave, report, spread
from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import Layout
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.schedule import (
    Action,
    Costs,
    Schedule,
    Send,
    gpipe,
    interleaved,
    one_f_one_b,
    peak_live,
    rank_programs,
    timeline,
    validate,
    zero_bubble_h1,
    zero_bubble_v,
)
from megatree.runtime.gradients import Gradients, make_gradients

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


class Alone(RankComm):
    """One pipeline rank without the others: sends go nowhere, receives are ready."""

    def __init__(self, num_ranks: int, rank: int) -> None:
        self.sizes, self.coords = {"pp": num_ranks}, {"pp": rank}
        self.device = torch.device("cpu")
        self.ready: dict[Any, Tensor] = {}

    def send_async(self, x: Tensor, axis: str, to: int) -> Callable[[], None]:
        """Send nothing."""
        return lambda: None

    def recv_async(
        self, shape: tuple[int, ...], dtype: torch.dtype, axis: str, source: int
    ) -> Callable[[], Tensor]:
        """Return a tensor made before."""
        key = shape, dtype
        if key not in self.ready:
            self.ready[key] = torch.full(shape, 0.01, dtype=dtype)
        x = self.ready[key]
        return lambda: x


Step = tuple[Gradients, Schedule, list[dict[str, Tensor]], Mapping[Any, Tensor]]


def one_rank(generate: Callable[[int, int], Schedule], p: int, rank: int, m: int) -> Step:
    """Return a rank's gradients, its schedule, and the consts and weights of a step."""
    schedule = generate(p, m)
    cfg = GPTConfig(
        vocab_size=32, seq_length=8, num_layers=schedule.num_stages, embed=16, kv_heads=2,
        group=2, head_dim=4, ffn=24,
    )  # fmt: skip
    layout = Layout(Mesh(pp=p), schedule=schedule)
    gradients = make_gradients(lower_model(gpt(cfg, batch_size=1), layout), Alone(p, rank))
    for buffer in gradients.weights.stored.values():
        buffer.normal_(0, 0.02)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "weights": torch.ones(1, 8)}
    consts = [gradients.bound.consts(batch) for _ in range(m)]
    return gradients, schedule, consts, {k: torch.tensor(8.0) for k in gradients.bound.term_keys}


def by_executor(step: Step) -> Callable[[], object]:
    """Return what the executor does with a step."""
    gradients, schedule, consts, weights = step
    return lambda: gradients.executor.run(schedule, consts, weights)


def by_hand(step: Step) -> Callable[[], object]:
    """Return a loop over the same programs, backwards and messages, all looked up before."""
    gradients, schedule, consts, weights = step
    bound, leaves, stages = gradients.bound, gradients.executor.leaves, gradients.executor.stages
    split, last, comm = schedule.splits, schedule.num_stages - 1, gradients.bound.comm
    program = rank_programs(schedule)[comm.coords["pp"]]
    calls: dict[tuple[int, int], list[Any]] = {}
    products: dict[tuple[int, int], list[Any]] = {}
    others: dict[int, dict[Any, Tensor]] = {}
    for number, stage in stages.items():
        for i, const in enumerate(consts):
            units = calls[number, i] = []
            products[number, i] = []
            for name, index, layer in stage.entries:
                call = bound._split_units[name].run if split else bound._units[name]
                todo = bound._slots(name, index) if split else []
                products[number, i] += todo
                tail = [*bound._consts_for(name, const, layer), *(s for d in todo for s in d.slots)]
                w = bound._joined[name](leaves.of[name, index])
                units.append((call, w, tail, bound.program.units[name].num_carry))
            entries = [(name, index) for name, index, _ in stage.entries]
            taken = {key for d in products[number, i] for key in d.weights}
            others[number] = leaves.inputs(entries, taken)
    (seed_of_loss,) = [1.0 / weight for weight in weights.values()]

    def run() -> None:
        live: dict[Any, Any] = {}
        arrived: dict[Any, Any] = {}
        made: dict[Any, Any] = {}
        queued: dict[Any, Any] = {}
        for event in program:
            if isinstance(event, Send):
                comm.send_async(made.pop(event.message), "pp", event.to_rank)
                continue
            if not isinstance(event, Action):
                stage = stages[event.message.stage]
                (part,) = stage.enters if event.message.kind == "F" else stage.cotangents
                arrived[event.message] = comm.recv_async(*part, "pp", event.from_rank)
                continue
            kind, number, i = event
            if kind == "W":
                with torch.no_grad():
                    for product, x, g in queued.pop((number, i)):
                        leaves.add_product(product.weights, product.product, x, g)
                continue
            x = None
            if number != (0 if kind == "F" else last):
                x = arrived.pop(event)() if event in arrived else made.pop(event)
            if kind == "F":
                entered = carry = () if x is None else (x.detach().requires_grad_(),)
                out: tuple[Tensor, ...] = ()
                for call, w, tail, num_carry in calls[number, i]:
                    out = call(*w, *carry, *tail)
                    carry = out[:num_carry]
                live[number, i] = entered, out[0]
                made[Action("F", number + 1, i)] = out[0].detach()
                continue
            entered, root = live.pop((number, i))
            seed = seed_of_loss if x is None else x
            if not split:
                torch.autograd.backward(root, seed)
                made[Action("B", number - 1, i)] = entered[0].grad if entered else None
                continue
            todo, rest = products[number, i], others[number]
            slots = [slot for product in todo for slot in product.slots]
            inputs = [*entered, *rest.values(), *slots]
            grads = torch.autograd.grad([root], inputs, [seed], allow_unused=True)
            for key, g in zip(rest, grads[len(entered) :], strict=False):
                leaves.add(key, g)
            first = len(entered) + len(rest)
            queued[number, i] = list(zip(todo, grads[first::2], grads[first + 1 :: 2], strict=True))
            made[Action("B", number - 1, i)] = grads[0]

    return run


def bookkeeping(
    generate: Callable[[int, int], Schedule], p: int, rank: int, m: int, pairs: int
) -> dict[str, float]:
    """Return the executor's CPU time per action above the loop's, in microseconds."""
    step = one_rank(generate, p, rank, m)
    step[0].executor.leaves.begin(m)
    num_actions = len(step[1].ranks[rank])
    times = interleave(by_executor(step), by_hand(step), pairs=pairs)
    gaps = [a - b for a, b in zip(times.cpu_ours, times.cpu_theirs, strict=True)]
    return {
        "action_us": 1e6 * spread(times.cpu_theirs)["median"] / num_actions,
        **{f"extra_us_{k}": 1e6 * v / num_actions for k, v in spread(gaps).items()},
    }


def main() -> None:
    """Print a table of idle time per number of ranks, then the executor's bookkeeping."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, 2, 4, 8], help="m / p")
    parser.add_argument("--pairs", type=int, default=60, help="of steps timed; 0 for none")
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
    torch.set_num_threads(1)
    for name, generate in SCHEDULES.items() if args.pairs else ():
        result = bookkeeping(generate, 4, 1, 16, args.pairs)
        print(f"{name:<19} an action {result['action_us']:>6.0f} us, "
              f"the executor adds {result['extra_us_median']:>5.1f} us")  # fmt: skip
        report("bookkeeping", schedule=name, ranks=4, rank=1, microbatches=16, **result)


if __name__ == "__main__":
    main()
