"""The tables of the README, from the results that are kept in `benchmarks/results`."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
MARKS = ("gpu results", "multi-gpu results")
GPU_KEYS = ("model", "row", "attention", "sequences")
MULTI_GPU_KEYS = ("part", "model", "layout", "ranks")
NAMES = {
    "control": "control, by hand",
    "megatree": "megatree",
    "hugging-face": "Hugging Face, layers compiled",
}


def read(name: str, keys: Sequence[str] = GPU_KEYS) -> list[dict[str, Any]]:
    """Return the results of a file of JSON lines; the last of those that agree in `keys` counts."""
    path = RESULTS / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return list({tuple(r[key] for key in keys): r for r in rows}.values())


def gpu_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table of `benchmarks.gpu` in Markdown, with where it was measured below."""
    rows = list(rows)
    if not rows:
        return "Not measured yet.\n"
    head = ["model", "", "ms a step", "tokens/s", "MFU", "peak GiB", "first step s", "of control"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in rows:
        kernel = ", FA4" if r["attention"] == "fa4" else ""
        ratio = "" if r.get("of_control") is None else f"{r['of_control']:.3f}"
        cells = [
            r["model"],
            NAMES[r["row"]] + kernel,
            f"{r['step_ms']:.1f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{100 * r['mfu']:.1f}%",
            f"{r['peak_gib']:.1f}",
            f"{r['first_step_s']:.1f}",
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{_facts(rows)}\n"


def multi_gpu_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return what `benchmarks.multi_gpu` found in Markdown: exactness in a line, speed in a table.

    Rows of CPUs, which are for trying things out, and of runs that failed are left out.
    """
    rows = [r for r in rows if r["card"] != "cpu" and not r.get("error")]
    parts = {part: [r for r in rows if r["part"] == part] for part in ("exactness", "scaling")}
    parts["exactness"] = [r for r in parts["exactness"] if r["ranks"] > 1]  # not the reference
    if not rows:
        return "Not measured yet.\n"
    out = []
    if exact := [r for r in parts["exactness"] if not r["wrong"]]:
        out += [
            f"One step in float32 under {len(exact)} of {len(parts['exactness'])} layouts of "
            f"{max(r['ranks'] for r in exact)} GPUs equals that of one: loss within "
            f"{max(r['loss'] for r in exact):.0e}, gradients of every leaf within "
            f"{max(r['grads'] for r in exact):.0e}.",
            "",
        ]
    if parts["scaling"]:
        hidden = {(r["model"], r["layout"], r["ranks"]): r for r in rows if r["part"] == "overlap"}
        head = ["model", "GPUs", "layout", "mesh", "tokens/s a GPU", "MFU", "peak GiB"]
        head += ["of one GPU", "time, memory of plan", "communication hidden"]
        out += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        out += [_scaling_line(r, hidden) for r in parts["scaling"]]
        lines = {
            f"{r['published']}: {r['published_mfu']:.0%} MFU" for r in rows if "published" in r
        }
        out += ["", *(f"Published: {line}." for line in sorted(lines))]
    return "\n".join([*out, _facts(rows)]) + "\n"


def _scaling_line(r: dict[str, Any], hidden: dict[Any, dict[str, Any]]) -> str:
    profile = hidden.get((r["model"], r["layout"], r["ranks"]))
    of_plan = (r["time_of_plan"], r["memory_of_plan"])
    share = ""
    if profile is not None:
        found = profile["collectives"]["all"]
        total = found["hidden_ms"] + found["exposed_ms"]
        share = f"{100 * found['hidden_ms'] / total:.0f}% of {total:.1f} ms" if total else "none"
    cells = [
        r["model"] + (f", {r['layers']} layers" if r["ranks"] == 1 else ""),
        str(r["ranks"]),
        r["layout"],
        r["mesh"],
        f"{r['tokens_per_s_per_rank']:,.0f}",
        "" if r["mfu"] is None else f"{100 * r['mfu']:.1f}%",
        f"{r['peak_bytes'] / 2**30:.1f}",
        "" if r["efficiency"] is None else f"{100 * r['efficiency']:.1f}%",
        "" if None in of_plan else ", ".join(f"{x:.2f}" for x in of_plan),
        share,
    ]
    return f"| {' | '.join(cells)} |"


def _facts(rows: Sequence[dict[str, Any]]) -> str:
    """Return where and when rows were measured."""
    facts = sorted({f"{r['card']}, torch {r['torch']}, {r['date']}" for r in rows})
    commits = sorted({r["commit"] for r in rows if r["commit"]})
    at = f"; commit {', '.join(commits)}" if commits else ""
    return f"{'; '.join(facts)}{at}."


def tables() -> dict[str, str]:
    """Return mark -> table of the results that are kept."""
    found = gpu_table(read("gpu.jsonl")), multi_gpu_table(read("multi_gpu.jsonl", MULTI_GPU_KEYS))
    return dict(zip(MARKS, found, strict=True))


def with_tables(text: str) -> str:
    """Return the README with its tables made anew.

    Raises:
        ValueError: the marks between which they stand are missing.
    """
    for mark, table in tables().items():
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
        if begin not in text or end not in text:
            raise ValueError(
                f"README.md: has no {begin.strip()} and {end.strip()}. Add both marks."
            )
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the README's tables")
    if parser.parse_args().write:
        README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n".join(tables().values()))


if __name__ == "__main__":
    main()
