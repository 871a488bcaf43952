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
        + ("" if fields.get("mfu") is None else f"  {fields['mfu']:.1%} MFU")
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


_LINES = {
    "start": _start,
    "step": _step,
    "eval": _eval,
    "saved": _saved,
    "odd": _odd,
    "stopped": _stopped,
}


def _ranks(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) or "(none)" if isinstance(value, list) else str(value)
    return escape(text)
