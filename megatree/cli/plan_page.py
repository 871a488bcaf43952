"""A plan as one self-contained page: program, collectives by source line, memory bars, mesh."""

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from megatree.recipes.config import RunConfig

if TYPE_CHECKING:
    from megatree.parallel.plan import Estimate, Plan, StagePlan

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; color: #1d2330; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; font-size: 12px; line-height: 1.5 }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .2rem .8rem; text-align: left }
th { border-bottom: 1px solid #aab } td.n { text-align: right; font-variant-numeric: tabular-nums }
.move { color: #b3261e; font-weight: 600 } .muted { color: #667 }
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

    program = lower_model(model_of(cfg), layout_of_run(cfg))
    unit = next(name for name, index, _ in program.order if index is not None)
    sections = [
        f"<h1>Plan on {escape(made.mesh)}</h1>",
        f'<p class="muted">{made.num_params:,} parameters, {made.num_ranks:,} ranks, '
        f"{made.num_microbatches} microbatches, {made.tokens_per_step:,} tokens a step, "
        f"{made.flops_per_token / 1e9:.3f} GFLOPs a token. Estimate on H100s: "
        f"{escape(str(guess))}.</p>",
        "<h2>Mesh</h2>",
        mesh_picture(made.mesh_sizes),
        "<h2>Memory of one rank, by pipeline rank</h2>",
        memory_bars(made.stages),
        "<h2>Collectives of one rank, one step</h2>",
        collectives(made),
        f"<h2>Program of {escape(unit)}</h2>",
        program_text(program.explain(unit)),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>megatree plan</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )


def mesh_picture(sizes: Iterable[tuple[str, int]]) -> str:
    """Draw the innermost two axes as a grid of ranks, the outer ones as counts."""
    sizes = list(sizes) or [("one device", 1)]
    (row_name, rows), (column_name, columns) = ([("", 1), *sizes])[-2:]
    outer = ", ".join(f"{n} x {name}" for name, n in sizes[:-2])
    shown_rows, shown_columns = min(rows, 8), min(columns, 16)
    cells = "".join(
        f"<rect x='{60 + 46 * c}' y='{24 + 30 * r}' width='40' height='24' rx='4' fill='#dfe7f2' "
        f"stroke='#3a6ea5'/><text x='{80 + 46 * c}' y='{41 + 30 * r}' font-size='11' "
        f"text-anchor='middle'>{r * columns + c}</text>"
        for r in range(shown_rows)
        for c in range(shown_columns)
    )
    width, height = 80 + 46 * shown_columns, 40 + 30 * shown_rows
    note = f"{outer} of this grid; " if outer else ""
    note += f"{rows} x {row_name}, " if row_name else ""
    note += f"{columns} x {column_name}"
    if (shown_rows, shown_columns) != (rows, columns):
        note += f" (the first {shown_rows} x {shown_columns} are drawn)"
    return (
        f"<svg width='{width}' height='{height}' font-family='system-ui, sans-serif'>"
        f"<text x='60' y='14' font-size='12' fill='#667'>{escape(column_name)}</text>"
        f"<text x='8' y='41' font-size='12' fill='#667'>{escape(row_name)}</text>{cells}</svg>"
        f"<p class='muted'>{escape(note)}</p>"
    )


def memory_bars(stages: Iterable["StagePlan"]) -> str:
    """Draw one bar per pipeline rank, all to one scale."""
    stages = list(stages)
    most = max(s.peak_bytes for s in stages) or 1
    key = "".join(f"<span class='{css}'></span>{name}" for css, name, _ in _PARTS)
    rows = [f"<p class='key'>{key}<span class='a'></span>activations</p>"]
    for s in stages:
        parts = [(css, getattr(s, field)) for css, _, field in _PARTS]
        parts.append(("a", int(s.activation_bytes * s.live_microbatches)))
        bars = "".join(
            f"<span class='{css}' style='width:{100 * size / most:.2f}%' "
            f"title='{size:,} bytes'></span>"
            for css, size in parts
        )
        rows.append(
            f"<div>rank {s.rank}: {s.peak_bytes / 2**30:,.3f} GiB<div "
            f"class='bar'>{bars}</div></div>"
        )
    return "".join(rows)


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
