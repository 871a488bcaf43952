"""A timeline as an image: a bar per action, drawn by matplotlib (the extra `plot`)."""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

from megatree.parallel.schedule.action import Action
from megatree.parallel.schedule.timeline import Timeline

COLOURS = {"F": "#4878a8", "B": "#d98c3f", "W": "#6aa56a"}
MEANING = {"F": "forward", "B": "backward", "W": "weight gradients"}
LABELLED = 4000


def plot(timeline: Timeline, path: str | Path) -> None:
    """Write a picture of a timeline: a row per rank, a bar per action with its microbatch.

    The later stages of a rank are paler. Beyond 4000 actions, bars bear no numbers.

    Args:
        timeline: what to draw.
        path: the file to write; its ending names the format (.png, .svg, .pdf).

    Raises:
        ImportError: matplotlib is not installed.
    """
    ranks = timeline.schedule.ranks
    width = min(max(0.3 * max(map(len, ranks)), 6), 24)
    figure = _matplotlib("figure").Figure(figsize=(width, min(1.4 + 0.3 * len(ranks), 40)))
    axes = figure.add_subplot()
    opacity = _opacity(timeline.schedule.stage_rank)
    for rank, row in enumerate(ranks):
        spans = [(timeline.start[a], timeline.end[a] - timeline.start[a]) for a in row]
        colours = [(COLOURS[a.kind], opacity[a.stage]) for a in row]
        axes.broken_barh(spans, (rank - 0.45, 0.9), facecolors=colours, edgecolor="white", lw=0.5)
        if len(timeline.start) <= LABELLED:
            _label(axes, rank, row, timeline)
    axes.set(xlim=(0, timeline.makespan), ylim=(len(ranks) - 0.5, -0.5), xlabel="time")
    axes.yaxis.set_major_locator(_matplotlib("ticker").MaxNLocator("auto", integer=True))
    axes.set_ylabel("pipeline rank")
    axes.set_title(str(timeline), fontsize=9, loc="left")
    patch = _matplotlib("patches").Patch
    kinds = ("F", "B", "W") if timeline.schedule.splits else ("F", "B")
    keys = [patch(color=COLOURS[kind], label=MEANING[kind]) for kind in kinds]
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False, "fontsize": 8}
    axes.legend(handles=keys, **place)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _matplotlib(part: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ModuleNotFoundError as missing:
        raise ImportError(
            "plot: matplotlib is not installed. Run `pip install 'megatree[plot]'`, or use draw, "
            "which needs nothing."
        ) from missing


def _opacity(stage_rank: tuple[int, ...]) -> list[float]:
    """Return per stage its bars' opacity: 1 for a rank's first stage, 0.45 for its last."""
    total = Counter(stage_rank)
    seen = dict.fromkeys(total, 0)
    opacity = []
    for rank in stage_rank:
        opacity.append(1 - 0.55 * seen[rank] / max(total[rank] - 1, 1))
        seen[rank] += 1
    return opacity


def _label(axes: Any, rank: int, row: tuple[Action, ...], timeline: Timeline) -> None:
    for action in row:
        middle = (timeline.start[action] + timeline.end[action]) / 2
        axes.text(middle, rank, action.microbatch, ha="center", va="center", fontsize=6)
