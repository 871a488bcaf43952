"""What a run looks after, and where it tells: health and logging as part of a config."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What is looked at while a run goes on, and what happens then.

    Args:
        nonfinite: when the loss or a gradient is not finite, "stop" the run, or "skip" the update.
        max_skips: updates in a row that may be skipped.
        spike_factor: a loss above so many times the median of the last is a spike; 0: none is.
        spike_window: losses that the median is of.
        spike: "stop" the run at a spike, "skip" its update, or "report" it.
        delay: steps that a look at the loss and the gradients may come late, so that the host need
            not wait for the device at every step. Reports come as late; evaluations and
            checkpoints look at once.
        invariant_every: steps between comparisons, bit for bit, of what ranks hold copies of; 0
            for none.
        hang_s: seconds that a rank may wait for others in one call, until all are asked where they
            are and the run ends; 0 leaves it to the process group's own time-out.
        stop_on: signals that make the run save a checkpoint and end.
    """

    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = 10
    spike_factor: float = 0.0
    spike_window: int = 32
    spike: Literal["stop", "skip", "report"] = "stop"
    delay: int = 0
    invariant_every: int = 0
    hang_s: float = 600.0
    stop_on: tuple[str, ...] = ("SIGTERM",)

    def __post_init__(self) -> None:
        if self.max_skips < 1 or self.spike_window < 1:
            raise ValueError(
                f"health: max_skips {self.max_skips} and spike_window {self.spike_window} count "
                "steps. Give at least 1."
            )
        if self.spike_factor != 0.0 and self.spike_factor <= 1.0:
            raise ValueError(
                f"health.spike_factor: every second loss is above {self.spike_factor} times the "
                "median. Give more than 1, or 0 for no look-out."
            )
        if self.invariant_every < 0 or self.hang_s < 0.0:
            raise ValueError(
                f"health: invariant_every {self.invariant_every} and hang_s {self.hang_s} are "
                "lengths of time. Give at least 0; 0 means never."
            )
        if self.delay and self.spike == "skip":
            raise ValueError(
                f"health.delay: a look {self.delay} steps late cannot skip the update of a spike. "
                "Set health.delay to 0, or health.spike to stop."
            )
        if self.delay < 0:
            raise ValueError(
                f"health.delay: a look {self.delay} steps late. Give at least 0; 0 looks at once."
            )
        for name in self.stop_on:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(
                    f"health.stop_on: {name!r} is no signal that a process can handle. Use "
                    "SIGTERM, SIGUSR1 or SIGUSR2."
                )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where news of a run goes, besides the terminal and metrics.jsonl.

    Args:
        tensorboard: folder of TensorBoard's files, "auto" for one in checkpoint.dir, "" for none.
        wandb: project of Weights & Biases, "" for none.
        peak_flops: FLOP/s of one device that MFU is measured against; 0 for the datasheet's of a
            GPU that is known by name, and no MFU elsewhere.
    """

    tensorboard: str = ""
    wandb: str = ""
    peak_flops: float = 0.0

    def __post_init__(self) -> None:
        if self.peak_flops < 0.0:
            raise ValueError(
                f"log.peak_flops: {self.peak_flops} FLOP/s. Give a positive rate, or 0."
            )

    def tensorboard_dir(self, directory: str) -> str:
        """Return the folder of TensorBoard's files."""
        if self.tensorboard != "auto":
            return self.tensorboard
        if not directory:
            raise ValueError(
                "log.tensorboard: 'auto' is a folder in checkpoint.dir, which is empty. Name a "
                "folder."
            )
        return str(Path(directory) / "tensorboard")
