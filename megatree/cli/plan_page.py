"""A plan as one self-contained page: program, collectives by source line, memory bars, mesh."""

import inspect
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from megatree.recipes.config import RunConfig

if TYPE_CHECKING:
    from megatree.functional.chain import Chain
    from megatree.parallel.plan import Estimate, Plan, PlannedCollective, StagePlan

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; color: #1d2330; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; font-size: 12px; line-height: 1.5 }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .2rem .8rem; text-align: left }
th { border-bottom: 1px solid #aab } td.n { text-align: right; font-variant-numeric: tabular-nums }
.move, .backward { color: #b3261e } .move { font-weight: 600 }
.forward, .recompute { color: #2a5d8f }
 .muted { color: #667 }
.bar { height: 20px; display: flex; margin: .15rem 0 } .bar span { display: block }
.w { background: #3a6ea5 } .g { background: #7fb069 }
.o { background: #e6a23c } .a { background: #b3506e }
.key span { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem }
"""
_PARTS = (
    ("w", "weights", "parameter_bytes"),
    ("g", "gradients", "gradient_bytes"),
    ("o", "optimizer", "optimizer_bytes"),
)


def page(cfg: RunConfig, made: "Plan", guess: "Estimate") -> str:
    """Return the page as HTML text; it loads nothing from elsewhere."""
    from megatree.parallel.model import lower_model
    from megatree.recipes.build import layout_of_run, model_of

    layout = layout_of_run(cfg)
    program = lower_model(model_of(cfg), layout)
    unit = next(name for name, index, _ in program.order if index is not None)
    several = "s" if made.num_microbatches > 1 else ""
    sections = [
        f"<h1>Plan on {escape(made.mesh)}</h1>",
        f'<p class="muted">{made.num_params:,} parameters, {made.num_ranks:,} ranks, '
        f"{made.num_microbatches} microbatch{several and 'es'}, {made.tokens_per_step:,} tokens a "
        f"step, {made.flops_per_token / 1e9:.3f} GFLOPs a token. Estimate on H100s: "
        f"{escape(str(guess))}.</p>",
        "<h2>Mesh</h2>",
        mesh_picture(made.mesh_sizes),
        mesh_cuts(made.mesh_sizes, layout.rules.table),
        "<h2>Memory of one rank, by pipeline rank</h2>",
        memory_bars(made.stages),
        "<h2>Where the model communicates (one rank, one step)</h2>",
        over_source(made, source_files(program.model)),
        f"<h2>Program of {escape(unit)}</h2>",
        program_text(program.explain(unit)),
        "<h2>All collectives of one rank, one step</h2>",
        collectives(made),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>megatree plan</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )


def mesh_picture(sizes: Iterable[tuple[str, int]]) -> str:
    """Draw the ranks: the innermost two axes as a grid, the outer ones as grids side by side."""
    sizes = list(sizes) or [("one device", 1)]
    (row_name, rows), (column_name, columns) = ([("", 1), *sizes])[-2:]
    outer = [(name, n) for name, n in sizes[:-2] if n > 1]
    grids = math.prod(n for _, n in outer)
    shown = min(rows, 8), min(columns, 8), min(grids, 4)
    width, height = 60 + 46 * shown[1], 30 * shown[0] + 48
    panels = "".join(
        f"<g transform='translate({width * g},0)'>"
        + _grid(rows * columns * g, columns, shown[:2], (row_name, column_name))
        + f"<text x='60' y='{height - 4}' font-size='12' fill='#667'>"
        + f"{escape(_coordinates(g, outer))}</text></g>"
        for g in range(shown[2])
    )
    note = " x ".join(f"{name} {n}" for name, n in sizes)
    if shown != (rows, columns, grids):
        drawn = math.prod(shown)
        note += f" ({drawn} of {rows * columns * grids:,} ranks are drawn)"
    return (
        f"<svg id='mesh' width='{width * shown[2]}' height='{height}' "
        f"font-family='system-ui, sans-serif'>{panels}</svg><p class='muted'>{escape(note)}</p>"
    )


def _grid(first: int, columns: int, shown: tuple[int, int], names: tuple[str, str]) -> str:
    cells = "".join(
        f"<rect x='{60 + 46 * c}' y='{24 + 30 * r}' width='40' height='24' rx='4' fill='#dfe7f2' "
        f"stroke='#3a6ea5'/><text x='{80 + 46 * c}' y='{41 + 30 * r}' font-size='11' "
        f"text-anchor='middle'>{first + r * columns + c}</text>"
        for r in range(shown[0])
        for c in range(shown[1])
    )
    return (
        f"<text x='60' y='14' font-size='12' fill='#667'>{escape(names[1])}</text>"
        f"<text x='20' y='41' font-size='12' fill='#667'>{escape(names[0])}</text>{cells}"
    )


def _coordinates(index: int, axes: list[tuple[str, int]]) -> str:
    """Return "pp=1 dp=0" of a grid's place on the outer axes."""
    named = []
    for name, size in reversed(axes):
        index, at = divmod(index, size)
        named.append(f"{name}={at}")
    return " ".join(reversed(named))


def mesh_cuts(
    sizes: Iterable[tuple[str, int]], rules: Iterable[tuple[str, tuple[str, ...]]]
) -> str:
    """Return the table of mesh axes: how many ranks, and which logical axes each cuts."""
    rows = []
    for axis, size in sizes:
        cut = [name for name, by in rules if axis in by]
        what = ", ".join(cut) or ("stages of layers" if axis == "pp" else "nothing")
        rows.append(f"<tr><td>{escape(axis)}</td><td class='n'>{size}</td><td>{what}</td></tr>")
    head = "<tr><th>mesh axis</th><th>ranks</th><th>cuts</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def memory_bars(stages: Iterable["StagePlan"]) -> str:
    """Draw one bar per pipeline rank, all to one scale."""
    stages = list(stages)
    most = max(s.peak_bytes for s in stages) or 1
    names = (*_PARTS, ("a", "activations", ""))
    key = "".join(f"<span class='{css}'></span>{name}" for css, name, _ in names)
    rows = [f"<p class='key'>{key}</p>"]
    for s in stages:
        parts = [(css, name, getattr(s, field)) for css, name, field in _PARTS]
        parts.append(("a", "activations", s.peak_bytes - sum(size for _, _, size in parts)))
        bars = "".join(
            f"<span class='{css}' style='width:{100 * size / most:.2f}%' "
            f"title='{name}: {size:,} bytes'></span>"
            for css, name, size in parts
        )
        spelled = ", ".join(f"{name} {size / 2**30:,.3f}" for _, name, size in parts)
        rows.append(
            f"<div>rank {s.rank}: {s.peak_bytes / 2**30:,.3f} GiB <span class='muted'>({spelled})"
            f"</span><div class='bar'>{bars}</div></div>"
        )
    return "".join(rows)


def source_files(model: "Chain") -> dict[str, list[str]]:
    """Return "folder/file.py" -> its lines, of the files in which the model's segments stand."""
    functions = [
        piece.apply
        for segment in model.segments.values()
        for piece in (segment.kinds.values() if hasattr(segment, "kinds") else [segment])
    ]
    files = {inspect.getsourcefile(inspect.unwrap(fn)) for fn in functions}
    return {
        "/".join(Path(file).parts[-2:]): Path(file).read_text(encoding="utf-8").splitlines()
        for file in sorted(filter(None, files))
    }


def over_source(made: "Plan", files: dict[str, list[str]]) -> str:
    """Return the lines of the model that communicate, under the collectives of each."""
    at_line: dict[tuple[str, int], list[PlannedCollective]] = {}
    for c in made.collectives:
        file, _, line = c.source.rpartition(":")
        if c.phase in ("forward", "backward", "recompute") and file in files and line.isdigit():
            at_line.setdefault((file, int(line)), []).append(c)
    out: list[str] = []
    function = ""
    for (file, line), found in sorted(at_line.items()):
        text = files[file]
        define = next((n for n in range(line - 1, -1, -1) if text[n].startswith("def ")), line - 1)
        if text[define] != function:
            function = text[define]
            place = escape(f"{file}:{define + 1}")
            out.append(f"<span class='muted'>{place:<24}{escape(function)}</span>")
        for c in sorted(found, key=lambda c: (c.phase != "forward", c.unit)):
            size = f"{c.count} x {c.bytes / 2**20:,.2f} MiB"
            called = f"{c.phase:<10}{c.kind}({' '.join(c.axes)})  {size}  in {c.unit}"
            out.append(f"{'':<28}<span class='{c.phase}'>{escape(called)}</span>")
        place = escape(f"{file}:{line}")
        out.append(f"{place:<24}<b>{escape(text[line - 1])}</b>")
    return f"<pre id='source'>{chr(10).join(out)}</pre>" if out else "<p>Nowhere.</p>"


def collectives(made: "Plan") -> str:
    """Return the table of collectives."""
    rows = "".join(
        f"<tr><td>{escape(c.source)}</td><td>{escape(c.unit)}</td><td>{c.phase}</td>"
        f"<td>{c.kind}</td><td>{escape(' '.join(c.axes))}</td>"
        f"<td class='n'>{c.bytes / 2**20:,.2f}</td><td class='n'>{c.count}</td></tr>"
        for c in made.collectives
    )
    heads = ("source", "unit", "phase", "collective", "over", "MiB", "times")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{rows or '<tr><td>none</td></tr>'}</table>"


def program_text(text: str) -> str:
    """Return a program's text with the lines that move data marked."""
    lines = (
        f"<span class='move'>{escape(line)}</span>" if "> " in line[:24] else escape(line)
        for line in text.splitlines()
    )
    return f"<pre>{chr(10).join(lines)}</pre>"
