"""Where news of a run goes besides metrics.jsonl: TensorBoard and Weights & Biases."""

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megatree.recipes.health_config import LogConfig

Writer = Callable[[str, Mapping[str, Any]], None]
"""What takes a report: a kind ("step", "eval", "saved") and its fields."""


def writers(
    cfg: LogConfig, directory: str, *, run: Mapping[str, Any], step: int = 0
) -> list[Writer]:
    """Return what a run reports to; rank 0 calls it.

    Args:
        cfg: what is asked for.
        directory: of the run, "" for none.
        run: the run's config as plain values, for those who keep it.
        step: that the run goes on from.

    Raises:
        ValueError: a package is asked for and not installed.
    """
    out: list[Writer] = []
    if cfg.tensorboard:
        out.append(tensorboard(cfg.tensorboard_dir(directory), step))
    if cfg.wandb:
        out.append(wandb(cfg.wandb, directory, run))
    return out


def numbers(kind: str, fields: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    """Yield name -> number of what can be drawn over steps.

    >>> dict(numbers("eval", {"step": 3, "valid_loss": 2.0, "terms": {"lm": 1.5}, "mfu": None}))
    {'eval/valid_loss': 2.0, 'eval/terms/lm': 1.5}
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from numbers(kind, value, f"{place}{name}/")
        elif isinstance(value, int | float) and name != "step" and math.isfinite(value):
            yield f"{kind}/{place}{name}", float(value)


def tensorboard(directory: str, step: int = 0) -> Writer:
    """Return what writes TensorBoard's event files.

    Args:
        directory: of the files.
        step: whose later values, of a run that was cut short, are to be hidden.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    _require("tensorboard", "log.tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(directory, purge_step=step + 1 if step else None)

    def write(kind: str, fields: Mapping[str, Any]) -> None:
        if "step" not in fields or kind == "start":
            return
        for name, value in numbers(kind, fields):
            writer.add_scalar(name, value, fields["step"])
        writer.flush()  # whoever kills the run loses nothing

    return write


def wandb(project: str, directory: str, run: Mapping[str, Any]) -> Writer:
    """Return what writes to a project of Weights & Biases.

    Raises:
        ValueError: its package is not installed.
    """
    package = _require("wandb", "log.wandb")
    session = package.init(
        project=project,
        config=dict(run),
        dir=directory or None,
        id=Path(directory).name if directory else None,
        resume="allow",
    )

    def write(kind: str, fields: Mapping[str, Any]) -> None:
        if "step" not in fields or kind == "start":
            return
        session.log(dict(numbers(kind, fields)), step=int(fields["step"]))

    return write


def _require(package: str, place: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise ValueError(
            f"{place}: the package {package!r} is not installed. Run pip install {package}, or "
            f"leave {place} empty."
        ) from None
