"""Where a run is kept, how, for how long, and from where it goes on."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run is kept, and from where it goes on.

    Args:
        dir: folder of checkpoints, config.json and metrics.jsonl; "" keeps nothing.
        url: where the checkpoints go instead, an fsspec URL such as s3://bucket/run.
        every: steps between checkpoints, beside the one at the end; 0 for that one alone.
        resume: "auto" goes on from the latest checkpoint in dir if there is one, "never" starts
            anew, anything else is the checkpoint to go on from.
        weights: where nothing is resumed, begin with the weights of this checkpoint, on data of its
            own (fine-tuning): no moments, step 0.
        skip: glob patterns of parameters that begin anew beside those of weights, such as head*.
        masters: "drop" goes on without float32 masters from a checkpoint that has them.
        asynchronous: write while training goes on.
        host_mib: host memory of a rank for the copies that are written then; what does not fit is
            waited for.
        keep_last: how many of the newest checkpoints stay; 0 keeps all.
        keep_every: those of every so many steps stay too; 0 for none.
        keep_best: and so many with the least held-out loss; 0 for none.
    """

    dir: str = ""
    url: str = ""
    every: int = 0
    resume: str = "auto"
    weights: str = ""
    skip: tuple[str, ...] = ()
    masters: Literal["keep", "drop"] = "keep"
    asynchronous: bool = False
    host_mib: int = 4096
    keep_last: int = 0
    keep_every: int = 0
    keep_best: int = 0

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every: {self.every}. Give steps, or 0 for the end alone.")
        if (self.every or self.url) and not self.dir:
            said = f"checkpoint.every is {self.every}" if self.every else "checkpoint.url is set"
            raise ValueError(
                f"checkpoint.dir: empty, but {said}. "
                f"Name a folder, or {'set checkpoint.every to 0' if self.every else 'no url'}."
            )
        if not self.resume:
            raise ValueError('checkpoint.resume: empty. Use "auto", "never" or a checkpoint.')
        if self.skip and not self.weights:
            raise ValueError(
                f"checkpoint.skip: {' '.join(self.skip)}, but checkpoint.weights is empty: a run "
                "that goes on takes all leaves. Name weights, or leave skip out."
            )
        if "://" in self.dir:
            raise ValueError(
                f"checkpoint.dir: {self.dir} is a URL, and metrics.jsonl grows line by line. Name "
                "a folder, and the URL in checkpoint.url."
            )
        if self.host_mib < 4:
            raise ValueError(
                f"checkpoint.host_mib: {self.host_mib} MiB hold no block of 4. Give 4 or more."
            )
        if min(self.keep_last, self.keep_every, self.keep_best) < 0:
            raise ValueError(
                f"checkpoint: keep_last {self.keep_last}, keep_every {self.keep_every} and "
                f"keep_best {self.keep_best} count checkpoints. Give at least 0."
            )
        if (self.keep_every or self.keep_best) and not self.keep_last:
            raise ValueError(
                "checkpoint.keep_last: 0 keeps all, so keep_every and keep_best change nothing. "
                "Set checkpoint.keep_last to 1 or more."
            )

    @property
    def place(self) -> str:
        """Where the checkpoints are."""
        return self.url or self.dir
