"""metrics.jsonl: one line per report, and no line twice when a run goes on from a checkpoint."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def keep_up_to(directory: str, step: int) -> None:
    """Drop the lines of steps after `step`, which the run is about to make again."""
    path = Path(directory) / METRICS_FILE
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    replace_text(path, "".join(f"{line}\n" for line in kept))


def append(directory: str, kind: str, fields: Mapping[str, Any]) -> None:
    """Add a line; JSON has no NaN, so a number that is not finite becomes null."""
    with open(Path(directory) / METRICS_FILE, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(_plain({"kind": kind, **fields}), allow_nan=False) + "\n")


def read(directory: str) -> list[dict[str, Any]]:
    """Return all lines."""
    text = (Path(directory) / METRICS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def replace_text(path: Path, text: str) -> None:
    """Write a file anew; whoever reads meanwhile sees the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    """Return the step of a line; one that a crash cut short is as good as later."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
