"""Several GPUs of one host: every parallelism against one rank, speed, and what is hidden.

`exactness` makes one step in float32 under every layout and compares it with one rank's: loss,
norm, all gradients, and the loss after the update. `scaling` trains llamas through the path of
`megatree train` on 1, 2, 4 .. ranks, beside what the plan says. `overlap` profiles a step of each
on all ranks. With `--device cpu` all of it runs on gloo processes, with tiny models.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import multi_gpu_exactness as exactness
from benchmarks import multi_gpu_speed as speed
from benchmarks.apart import Outcome, apart
from benchmarks.multi_gpu_cases import Cut, dimensions, exact_config, mixes, speed_cuts
from megatree.recipes.config import MeshConfig, RunConfig

PARTS = ("exactness", "scaling", "overlap")

PUBLISHED: Mapping[str, tuple[float, str]] = {
    "llama-7b": (0.47, "Megatron-LM, 7.1 B at tp 2, H100"),
}
"""Model -> MFU that others have published, and of what."""

PLANNED = 0.10
"""Part by which time and memory may be off the plan."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs share.

    Args:
        args: of the command.
        machine: the devices.
        commit: of this tree, "" if it is not known.
        ends: time at which no run starts any more.
        done: rows that exist already, by `key_of`.
    """

    args: argparse.Namespace
    machine: speed.Facts
    commit: str
    ends: float
    done: Mapping[tuple[Any, ...], Row]

    @property
    def on_gpu(self) -> bool:
        """Whether ranks have GPUs."""
        return self.args.device == "cuda"

    def run(self, fn: Callable[..., Any], nproc: int, *args: Any, times: int = 1) -> Outcome:
        """Run a function on ranks of their own, if there is time; its limit is so many times."""
        if time.monotonic() > self.ends:
            return Outcome(value=None, error="not run: --deadline has passed", said="", seconds=0.0)
        limit_s = times * self.args.limit
        return apart(fn, nproc, *args, limit_s=limit_s, device=self.args.device)

    def row(self, part: str, name: str, ranks: int, **found: Any) -> Row:
        """Return a row with where and when it was measured."""
        return {
            "benchmark": "multi_gpu",
            "part": part,
            "layout": name,
            "ranks": ranks,
            **found,
            "card": self.machine.card,
            "torch": self.machine.torch,
            "nccl": self.machine.nccl,
            "commit": self.commit,
            "date": time.strftime("%Y-%m-%d"),
        }


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a row from others of its file."""
    return tuple(row.get(k) for k in ("part", "model", "layout", "ranks", "card", "commit"))


def exact_rows(bench: Bench) -> Iterator[Row]:
    """Yield a row per layout, and one of one rank for each kind of model."""
    n, wanted = bench.args.ranks, bench.args.layouts
    cuts = {**dimensions(n), **mixes(n)} if n > 1 else {}
    cuts = {name: cut for name, cut in cuts.items() if not wanted or name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        for experts in sorted({cut.experts for cut in cuts.values()} or {False}):
            mine = {name: cut for name, cut in cuts.items() if cut.experts == experts}
            yield from _exact_rows(bench, mine, experts, Path(folder) / f"reference_{experts}")


def _exact_rows(bench: Bench, cuts: Mapping[str, Cut], experts: bool, file: Path) -> Iterator[Row]:
    """Yield the rows of one kind of model, that of one rank first."""
    shape = bench.args.shape or ("small" if bench.on_gpu else "tiny")
    n, together = bench.args.ranks, bench.args.together
    one = Cut(mesh=MeshConfig(), experts=experts)

    def config(cut: Cut) -> RunConfig:
        return exact_config(cut, n, shape, limit_s=bench.args.limit)

    def row(name: str, cut: Cut, found: Mapping[str, Any]) -> Row:
        head = bench.row("exactness", name, cut.mesh.num_ranks, model=shape, mesh=str(cut.mesh))
        return {**head, **found, "wrong": exactness.wrong(found)}

    out = bench.run(exactness.reference, 1, config(one), str(file))
    found = out.value or {"error": out.error, "said": out.said}
    yield row("one rank, experts" if experts else "one rank", one, found)
    left = [(k, cut) for k, cut in cuts.items() if key_of(row(k, cut, _SKIPPED)) not in bench.done]
    while left and not out.error:
        done = file.with_name(f"done_{len(left)}_{experts}")
        now = [(name, config(cut)) for name, cut in left[:together]]
        tried = bench.run(exactness.compare_all, n, now, str(file), str(done), times=len(now))
        lines = done.read_text(encoding="utf-8").splitlines() if done.exists() else []
        for (name, cut), line in zip(left, lines, strict=False):
            yield row(name, cut, json.loads(line))
        left = left[len(lines) :]
        if tried.error:  # by the first that did not end; those after it get new processes
            name, cut = left.pop(0)
            yield row(name, cut, {"error": tried.error, "said": tried.said})


_SKIPPED: Row = {"error": "not run"}


def speed_rows(bench: Bench) -> Iterator[Row]:
    """Yield rows of all models on 1, 2, 4 .. ranks: "scaling", and "overlap" on all ranks."""
    counts = [n for n in bench.args.counts if n <= bench.args.ranks]
    if "scaling" not in bench.args.only:
        counts = [max(counts)]  # what is profiled
    for model in bench.args.models:
        base: Row | None = None
        for n in counts:
            for name, chosen in _chosen(bench, model, n):
                for row in _speed(bench, model, name, n, chosen):
                    if row["part"] == "scaling" and not row.get("error"):
                        base = row if n == 1 else base
                        _against(row, base)
                    yield row


def _chosen(bench: Bench, model: str, n: int) -> Iterator[tuple[str, speed.Chosen | None]]:
    """Yield layout -> the run of it that fits; None where the plan says that nothing does."""
    shape = speed.MODELS[model]
    options: dict[str, Any] = {"compiled": bench.on_gpu, "steps": _steps(bench.args)}
    wanted = bench.args.layouts
    for name, cut in speed_cuts(n).items():
        if n > 1 and wanted and name not in wanted:
            continue
        find = speed.shallower if n == 1 else speed.fit
        yield name, find(shape, cut, bench.machine, **options)
    if n >= 4 and (not wanted or "best mix" in wanted):
        found = speed.best_mix(shape, n, bench.machine, **options)
        yield "best mix", None if found is None else found[1]


def _steps(args: argparse.Namespace) -> int:
    return args.warmup + args.steps + 1 + args.profiled


def _speed(
    bench: Bench, model: str, name: str, n: int, chosen: speed.Chosen | None
) -> Iterator[Row]:
    """Yield the rows of one run."""
    args = bench.args
    profiles = "overlap" in args.only and n == max(k for k in args.counts if k <= args.ranks) > 1
    parts = ["scaling"] * ("scaling" in args.only) + ["overlap"] * profiles
    make = partial(bench.row, name=name, ranks=n, model=model)
    known = [bench.done.get(key_of(make(part))) for part in parts]
    if all(known):
        yield from filter(None, known)  # the first of them is what others are held against
        return
    if chosen is None:
        text = f"does not fit: no plan of it stays below {speed.FULL:.0%} of the device's memory"
        for part in parts:
            yield make(part, error=text, fits=False)
        return
    traces = Path(args.traces) / f"{model}_{n}_{name}".replace(", ", "_").replace(" ", "_")
    with tempfile.TemporaryDirectory() as folder:
        steps = _steps(args) if profiles else args.warmup + args.steps
        cfg = speed.with_data(chosen.cfg, folder, steps=steps, limit_s=args.limit)
        profiled = args.profiled if profiles else 0
        out = bench.run(speed.measure, n, cfg, args.warmup, args.steps, profiled, str(traces))
    said = {
        "mesh": str(cfg.mesh),
        "zero": cfg.storage.zero,
        "layers": cfg.model.num_layers,
        "sequences": chosen.sequences,
        "microbatches": cfg.train.global_batch // cfg.train.microbatch,
        "remat": cfg.remat.policy,
        "seconds": out.seconds,
    }
    for part in parts:
        if out.error:
            yield make(part, **said, error=out.error, said=out.said)
        elif part == "overlap":
            yield make(part, **said, **out.value["profile"])
        else:
            yield make(part, **said, **_scaling(bench, chosen, out.value, n))


def _scaling(bench: Bench, chosen: speed.Chosen, found: Mapping[str, Any], n: int) -> Row:
    """Return what was measured, and what was planned beside it."""
    kept = ("step_ms", "first_step_s", "peak_bytes", "model_flops_per_s", "mfu", "loss")
    planned = {"planned_ms": chosen.step_s * 1e3, "planned_bytes": chosen.peak_bytes}
    ratios: Row = {"time_of_plan": None, "memory_of_plan": None}
    if bench.on_gpu:
        ratios = {
            "time_of_plan": found["step_ms"] / planned["planned_ms"],
            "memory_of_plan": found["peak_bytes"] / planned["planned_bytes"],
        }
    return {
        "tokens_per_s_per_rank": found["tokens_per_s"] / n,
        **{key: found[key] for key in kept},
        **planned,
        **ratios,
    }


def _against(row: Row, base: Row | None) -> None:
    """Add how much of the work per second of one rank each rank does, and the published line.

    One rank may have fewer layers, where all of them do not fit: FLOPs tell, not tokens.
    """
    row["efficiency"] = base and row["model_flops_per_s"] / base["model_flops_per_s"]
    row["base_layers"] = base and base["layers"]
    published = PUBLISHED.get(row["model"])
    if published is not None:
        row["published_mfu"], row["published"] = published


def misses(rows: Sequence[Row]) -> list[str]:
    """Return which targets the rows of GPUs miss; nothing of rows without."""
    out = []
    for row in rows:
        if row["part"] != "scaling" or row.get("error") or row["card"] == "cpu":
            continue
        at = f"{row['model']} on {row['ranks']}: {row['layout']}"
        least = {("dp, ZeRO-1", 8): 0.95, ("tp, sp", 8): 0.80}.get((row["layout"], row["ranks"]))
        if least is not None and row["efficiency"] is not None and row["efficiency"] < least:
            out.append(f"{at}: {row['efficiency']:.1%} of one rank's rate, target {least:.0%}")
        for what in ("time", "memory"):
            if not abs(row[f"{what}_of_plan"] - 1) <= PLANNED:
                out.append(f"{at}: {what} is {row[f'{what}_of_plan']:.2f} of the plan's")
    for model, (mfu, whose) in PUBLISHED.items():
        ours = [
            r["mfu"] for r in rows if r["part"] == "scaling" and r["model"] == model
            and r["ranks"] > 1 and r.get("mfu")
        ]  # fmt: skip
        if ours and max(ours) < mfu:
            out.append(f"{model}: MFU {max(ours):.1%} at most; {whose}: {mfu:.0%}")
    return out


def line_of(row: Row) -> str:
    """Return a row of the tables that are printed."""
    part, name, n = row["part"], row["layout"], row["ranks"]
    if part == "exactness":
        head = f"{name:<42} {n:>2}"
        if row.get("error"):
            return f"{head}  {row['error']}"
        numbers = "".join(f"{row[key]:>9.1e}" for key in exactness.LIMITS)
        return f"{head} {numbers}  {row['worst']:<22} {row['wrong'] or 'ok'}"
    head = f"{row['model']:<9} {n:>2}  {name:<11} {row.get('mesh', ''):<20}"
    if row.get("error"):
        return f"{head} {row['error']}"
    if part == "overlap":
        parts = ", ".join(
            f"{k} {v['hidden_ms']:.2f} + {v['exposed_ms']:.2f}"
            for k, v in row["collectives"].items()
        )
        return f"{head} {row['step_ms']:>9.1f}  {parts}\n    {row['trace']}"
    rest = f"{row['sequences']:>4} {row['layers']:>6} {row['remat']:<9}"
    rest += f"{row['step_ms']:>9.1f} {row['tokens_per_s_per_rank']:>10,.0f} {_percent(row['mfu'])}"
    rest += f" {row['peak_bytes'] / 2**30:>6.1f} {_percent(row['efficiency'])}"
    rest += f" {row['planned_ms']:>9.1f} {_ratio(row['time_of_plan'])}"
    return f"{head} {rest} {row['planned_bytes'] / 2**30:>6.1f} {_ratio(row['memory_of_plan'])}"


def _percent(x: float | None) -> str:
    return "     -" if x is None else f"{100 * x:>5.1f}%"


def _ratio(x: float | None) -> str:
    return "    -" if x is None else f"{x:>5.2f}"


HEADS: Mapping[str, str] = {
    "exactness": f"{'layout':<42} ranks"
    + "".join(f"{key:>9}" for key in exactness.LIMITS)
    + "  of gradients, the worst",
    "scaling": f"{'model':<9} ranks {'layout':<10} {'mesh':<19} seq. layers remat      ms/step "
    "tok/s/rank   MFU    GiB   eff.   plan ms ratio  plan GiB ratio",
    "overlap": f"{'model':<9} ranks {'layout':<10} {'mesh':<19}   ms/step  "
    "ms hidden + exposed, a step",
}
"""Part -> head of its table."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command.

    Raises:
        SystemExit: they make no sense.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=0, help="0: as many as there are GPUs")
    parser.add_argument("--counts", type=_numbers, default=(), help="of scaling; default 1,2,4..")
    parser.add_argument("--only", type=_words, default=PARTS, help=",".join(PARTS))
    parser.add_argument("--models", type=_words, default=(), help=",".join(speed.MODELS))
    parser.add_argument("--layouts", type=_names, default=(), help="names in the tables, with ;")
    parser.add_argument("--shape", choices=["tiny", "small"], help="of exactness")
    parser.add_argument("--together", type=int, default=1, help="exact layouts of a start")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--profiled", type=int, default=1, help="steps in a trace")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of a run")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds until none starts")
    parser.add_argument("--out", default="", help="append JSON lines to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has, as it is")
    parser.add_argument("--traces", default="traces", help="folder of the traces")
    parser.add_argument("--commit", default="")
    args = parser.parse_args(words)
    args.models = args.models or (("tiny",) if args.device == "cpu" else ("llama-1b", "llama-7b"))
    for name, known in (("only", PARTS), ("models", tuple(speed.MODELS))):
        if odd := [x for x in getattr(args, name) if x not in known]:
            parser.error(f"--{name}: {odd[0]!r} is none of {', '.join(known)}")
    if args.ranks and args.ranks & (args.ranks - 1):
        parser.error(f"--ranks: {args.ranks} is no power of two")
    return args


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(";"))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def open_bench(args: argparse.Namespace) -> Bench:
    """Look at the machine, in a process of its own (this one makes no CUDA context).

    Raises:
        SystemExit: there are not as many GPUs as ranks.
    """
    found = apart(speed.facts, 1, limit_s=120.0, device=args.device)
    if found.error:
        sys.exit(f"multi_gpu: {found.error}\n{found.said}")
    if args.device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        args.ranks = args.ranks or 2 ** (gpus.bit_length() - 1) if gpus else 0
        if not 0 < args.ranks <= gpus:
            sys.exit(f"multi_gpu: {gpus} GPUs. Give --ranks up to that, or --device cpu.")
    args.ranks = args.ranks or 2
    args.counts = args.counts or tuple(2**k for k in range(args.ranks.bit_length()))
    commit = (
        args.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    done = {}
    if args.resume and args.out and Path(args.out).exists():
        rows = [json.loads(line) for line in Path(args.out).read_text().splitlines()]
        done = {key_of(row): row for row in rows if not row.get("error")}
    return Bench(
        args=args,
        machine=found.value,
        commit=commit,
        ends=time.monotonic() + args.deadline,
        done=done,
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run what was asked for; return 1 if a layout is not exact or a run failed."""
    args = parse(words)
    bench = open_bench(args)
    print(f"{args.ranks} ranks, {json.dumps(asdict(bench.machine))}, commit {bench.commit}")
    rows: list[Row] = []
    makers = [exact_rows] * ("exactness" in args.only)
    makers += [speed_rows] * bool({"scaling", "overlap"} & set(args.only))
    shown = ""
    for row in (row for make in makers for row in make(bench)):
        rows.append(row)
        if row["part"] not in (shown, "overlap"):
            shown = row["part"]
            print(f"\n{HEADS[shown]}")
        if row["part"] != "overlap":
            print(line_of(row), flush=True)
        if args.out and key_of(row) not in bench.done:
            with Path(args.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if profiles := [row for row in rows if row["part"] == "overlap"]:
        print("\n".join(["", HEADS["overlap"], *map(line_of, profiles)]), flush=True)
    bad = [r for r in rows if r.get("wrong") or (r.get("error") and r.get("fits", True))]
    print(f"\n{len(rows)} rows, {len(bad)} of them wrong or failed.")
    for row in bad:
        print(f"  {row['layout']} on {row['ranks']}: {row.get('wrong') or row['error']}")
    for text in misses(rows):
        print(f"  below the target: {text}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
