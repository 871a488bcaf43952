"""How news of a run looks on a terminal; plain text where there is none."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape


def show(kind: str, fields: Mapping[str, Any]) -> None:
    """Print one report of a run."""
    console = Console(soft_wrap=True, highlight=False)
    for line in _LINES[kind](fields):
        console.print(line)


def _start(fields: Mapping[str, Any]) -> list[str]:
    lines = [
        f"[bold]{fields['params'] / 1e6:,.2f} M parameters[/] in {fields['dtype']} "
        f"on {fields['mesh']} ({_ranks(fields['ranks'])}, {fields['device'].partition(':')[0]})",
        f"{fields['samples']:,} samples of {fields['seq']:,} tokens, "
        f"{fields['held_out']:,} held out; {fields['tokens_per_step']:,} tokens per step",
    ]
    if fields["resumed"]:
        lines.append(f"goes on from {escape(fields['resumed'])}")
        lines += [
            f"  {name}: {_shown(new)} (was {_shown(old)})"
            for name, (old, new) in fields["changed"].items()
        ]
    elif fields["weights"]:
        lines.append(f"starts anew with the weights of {escape(fields['weights'])}")
        lines += [f"  {escape(path)} begins anew" for path in fields.get("skipped", ())]
    elif fields["directory"]:
        lines.append(f"starts anew, kept in {escape(fields['directory'])}")
    if fields.get("masters"):
        lines.append(f"  {escape(fields['masters'])}")
    if fields["step"] >= fields["steps"]:
        lines.append(
            f"is at step {fields['step']} of {fields['steps']} already: nothing left to do. "
            "Raise train.steps, or name another checkpoint.dir"
        )
    return lines


def _step(fields: Mapping[str, Any]) -> list[str]:
    return [
        f"step {fields['step']:>6}  loss [bold]{fields['loss']:.4f}[/]  "
        f"grad norm {fields['grad_norm']:7.3f}  lr {fields['lr']:.2e}  "
        f"{fields['tokens_per_s']:>9,.0f} tokens/s  {fields['ms']:>7,.0f} ms"
        + ("" if fields.get("mfu") is None else f"  {fields['mfu']:.1%} MFU"),
        *_experts(fields),
    ]


def _experts(fields: Mapping[str, Any]) -> list[str]:
    """Say how even the load of experts was, and what the loss is made of."""
    if "experts" not in fields:
        return []
    load = fields["experts"]
    terms = ", ".join(f"{name} {value:.4f}" for name, value in fields["terms"].items())
    return [
        f"             experts: heaviest {load['max_load']:.2f} x the mean, lightest "
        f"{load['min_load']:.2f} x, entropy {load['entropy']:.1%}, dropped {load['drops']:.1%}; "
        f"terms: {terms}"
    ]


def _eval(fields: Mapping[str, Any]) -> list[str]:
    return [
        f"step {fields['step']:>6}  [green]held-out loss [bold]{fields['valid_loss']:.4f}[/][/]  "
        f"({fields['ms']:,.0f} ms)"
    ]


def _saved(fields: Mapping[str, Any]) -> list[str]:
    return [f"step {fields['step']:>6}  saved {escape(fields['path'])}  ({fields['ms']:,.0f} ms)"]


def _odd(fields: Mapping[str, Any]) -> list[str]:
    return [f"step {fields['step']:>6}  [yellow]{escape(fields['text'])}[/]"]


def _stopped(fields: Mapping[str, Any]) -> list[str]:
    end = "the same command goes on from here" if fields["saved"] else "nothing is saved"
    return [f"step {fields['step']:>6}  asked to stop: {end}"]


def _profile(fields: Mapping[str, Any]) -> list[str]:
    """Lay a table out: time by kind of work beside what the device could do it in."""
    lines = [
        f"step {fields['step']:>6}  profile of {fields['num_steps']} steps, "
        f"{fields['step_ms']:,.2f} ms each: {escape(fields['trace'])}",
        f"  {'':<16}{'ms':>10}{'share':>8}{'ceiling ms':>12}{'above':>10}{'hidden':>10}",
    ]
    rows = fields["rows"]
    above = {
        row["kind"]: row["ms"] - (row["ceiling_ms"] or 0.0)
        for row in rows
        if row["kind"] == "idle" or row["ceiling_ms"] is not None
    }
    largest = max(above, key=lambda kind: above[kind]) if len(above) > 1 else None
    for row in rows:
        kind = row["kind"]
        ceiling, over = _milliseconds(row["ceiling_ms"]), _milliseconds(above.get(kind))
        hidden = _milliseconds(row["hidden_ms"]) if row["hidden_ms"] else ""
        line = f"  {kind:<16}{row['ms']:>10,.2f}{row['share']:>8.1%}{ceiling:>12}{over:>10}"
        line = f"{line}{hidden:>10}".rstrip()
        lines.append(f"[bold]{line}[/]  <- the largest loss" if kind == largest else line)
    return lines


def _milliseconds(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.2f}"


_LINES = {
    "start": _start,
    "step": _step,
    "eval": _eval,
    "saved": _saved,
    "odd": _odd,
    "stopped": _stopped,
    "profile": _profile,
}


def _ranks(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) or "(none)" if isinstance(value, list) else str(value)
    return escape(text)
