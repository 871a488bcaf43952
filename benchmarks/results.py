"""The tables of the README, from the results that are kept in `benchmarks/results`."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- gpu results -->\n", "<!-- end of gpu results -->\n"
NAMES = {
    "control": "control, by hand",
    "megatree": "megatree",
    "hugging-face": "Hugging Face, layers compiled",
}


def read(name: str) -> list[dict[str, Any]]:
    """Return the results of a file of JSON lines; the last of a row and its options counts."""
    path = RESULTS / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return list({(r["model"], r["row"], r["attention"], r["sequences"]): r for r in rows}.values())


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
    facts = sorted({f"{r['card']}, torch {r['torch']}, {r['date']}" for r in rows})
    commits = sorted({r["commit"] for r in rows if r["commit"]})
    at = f"; commit {', '.join(commits)}" if commits else ""
    return "\n".join(lines) + f"\n\n{'; '.join(facts)}{at}.\n"


def with_tables(text: str) -> str:
    """Return the README with its tables made anew.

    Raises:
        ValueError: the marks between which they stand are missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md: has no {BEGIN.strip()} and {END.strip()}. Add both marks.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{gpu_table(read('gpu.jsonl'))}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the README's tables")
    if parser.parse_args().write:
        README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(gpu_table(read("gpu.jsonl")))


if __name__ == "__main__":
    main()
