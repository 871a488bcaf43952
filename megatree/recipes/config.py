"""What a run is: one frozen dataclass per concern, checked against each other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatree.models import GPTConfig
from megatree.recipes.words import did_you_mean

Dtype = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Ranks per mesh axis; their product is the number of processes.

    Args:
        pp: pipeline ranks: each holds stages of layers.
        dp: data parallel ranks: each takes its rows of every microbatch.
        tp: tensor parallel ranks: each holds its part of every weight matrix.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        _positive("mesh", pp=self.pp, dp=self.dp, tp=self.tp)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size; pp only if there is a pipeline."""
        return ({"pp": self.pp} if self.pp > 1 else {}) | {"dp": self.dp, "tp": self.tp}

    @property
    def num_ranks(self) -> int:
        """The number of processes."""
        return math.prod(self.sizes.values())

    def __str__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in self.sizes.items())


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How microbatches pass the stages, where mesh.pp is more than 1.

    Args:
        schedule: who does what when; "zb-h1" and "zb-v" compute weight gradients apart.
        virtual: stages per rank, with "interleaved".
        layers_per_stage: layers of every stage, in order; empty spreads them evenly.
    """

    schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"] = "1f1b"
    virtual: int = 1
    layers_per_stage: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _positive("pipeline", virtual=self.virtual)
        if (self.virtual > 1) != (self.schedule == "interleaved"):
            raise ValueError(
                f"pipeline.virtual: {self.virtual} stages per rank with schedule "
                f"{self.schedule!r}. Interleaving needs 2 or more, other schedules take 1."
            )


def megatron_rules(*, sequence_parallel: bool = False) -> dict[str, tuple[str, ...]]:
    """Return the usual rules: heads, feed-forward and vocabulary over tp, the batch over dp.

    Args:
        sequence_parallel: cut the residual stream along the sequence over tp as well.
    """
    return {
        "batch": ("dp",),
        "seq_res": ("tp",) if sequence_parallel else (),
        "kv_heads": ("tp",),
        "group": (),
        "ffn": ("tp",),
        "vocab": ("tp",),
    }


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and its tokenizer.

    Args:
        text: "demo" for the novels inside the package, or a file: .jsonl (a document per line, in
            "text") or .txt (one document); either may end in .xz.
        tokenizer: "demo" for the 512 entries inside the package, or a tokenizer.json, or a folder
            with vocab.json and merges.txt.
        eod: the entry that ends a document.
        valid_fraction: share of the documents that is held out for evaluation.
    """

    text: str = ""
    tokenizer: str = ""
    eod: str = "<|endoftext|>"
    valid_fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ValueError(
                f"data.valid_fraction: {self.valid_fraction} is not a share. Use one in [0, 1)."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and its learning rate: linear warm-up, then half a cosine down to the least.

    Args:
        lr: learning rate after the warm-up.
        min_lr: learning rate that the last steps come down to.
        warmup_steps: steps of the warm-up.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: times lr, taken off the matrices.
        clip: largest global norm of the gradients; None leaves them.
    """

    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"optimizer.min_lr: {self.min_lr} is not between 0 and optimizer.lr {self.lr}. "
                f"Set optimizer.min_lr to at most {self.lr}."
            )
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.eps <= 0:
            raise ValueError(
                f"optimizer: warmup_steps {self.warmup_steps} and weight_decay {self.weight_decay} "
                f"must be at least 0, eps {self.eps} above 0. Correct the sign."
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {self.betas} are not decays. Use two in [0, 1).")
        if self.clip is not None and self.clip <= 0.0:
            raise ValueError(
                f"optimizer.clip: no norm is below {self.clip}. Use a positive one, or None."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and rhythm of a run.

    Args:
        steps: optimizer steps, those before a resume included.
        global_batch: sequences per step.
        microbatch: sequences that go through the model at once, over all dp ranks.
        seed: of weights, dropout and the order of samples.
        log_every: steps between progress lines.
        eval_every: steps between evaluations; 0 for none.
        eval_samples: held-out sequences per evaluation, always the same ones.
    """

    steps: int
    global_batch: int
    microbatch: int
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    eval_samples: int = 0

    def __post_init__(self) -> None:
        _positive(
            "train",
            steps=self.steps,
            global_batch=self.global_batch,
            microbatch=self.microbatch,
            log_every=self.log_every,
        )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"train.seed: {self.seed} is out of range. Use one in [0, 2**63).")
        if min(self.eval_every, self.eval_samples) < 0:
            raise ValueError(
                f"train: eval_every {self.eval_every} and eval_samples {self.eval_samples} count "
                "things. Give at least 0."
            )
        self._divides("global_batch")
        self._divides("eval_samples")
        if self.eval_every and not self.eval_samples:
            raise ValueError(
                f"train.eval_samples: 0, but train.eval_every is {self.eval_every}. "
                f"Set train.eval_samples to {self.microbatch}, or train.eval_every to 0."
            )

    def _divides(self, name: str) -> None:
        size, part = getattr(self, name), self.microbatch
        if size % part:
            raise ValueError(
                f"train.{name}: {size} sequences are no whole number of microbatches of {part}. "
                f"Set train.{name} to {-(-size // part) * part}, or train.microbatch to "
                f"{math.gcd(size, part)}."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run is kept, and from where it goes on.

    Args:
        dir: folder of checkpoints, config.json and metrics.jsonl; "" keeps nothing.
        every: steps between checkpoints, beside the one at the end; 0 for that one alone.
        resume: "auto" goes on from the latest checkpoint in dir if there is one, "never" starts
            anew, anything else is the checkpoint to go on from.
    """

    dir: str = ""
    every: int = 0
    resume: str = "auto"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every: {self.every}. Give steps, or 0 for the end alone.")
        if self.every and not self.dir:
            raise ValueError(
                f"checkpoint.dir: empty, but checkpoint.every is {self.every}. "
                "Name a folder, or set checkpoint.every to 0."
            )
        if not self.resume:
            raise ValueError('checkpoint.resume: empty. Use "auto", "never" or a checkpoint.')


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides a run: the same config gives the same losses, on any mesh.

    Args:
        model: sizes and choices of the decoder.
        mesh: ranks per mesh axis.
        rules: logical axis -> the mesh axes that cut it; empty for none.
        pipeline: schedule and placement, where mesh.pp is more than 1.
        data: the text and its tokenizer.
        optimizer: AdamW and its learning rate.
        train: length and rhythm.
        checkpoint: where the run is kept.
        dtype: of parameters and products; moments and gradients are float32 or better.
        compile: whether every program goes through torch.compile.
    """

    model: GPTConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rules: dict[str, tuple[str, ...]] = field(default_factory=megatron_rules)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dtype: Dtype = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        check_rules(self.rules, self.mesh)
        parts = math.prod(self.mesh.sizes[axis] for axis in self.rules.get("batch", ()))
        if self.train.microbatch % parts:
            micro = self.train.microbatch
            raise ValueError(
                f"train.microbatch: {micro} sequences do not divide over {parts} ranks "
                f"({self.mesh}). Set train.microbatch to {-(-micro // parts) * parts}, or use "
                "fewer ranks for the batch."
            )
        if self.train.eval_every and not self.data.valid_fraction:
            raise ValueError(
                "data.valid_fraction: 0 holds nothing out, but train.eval_every is "
                f"{self.train.eval_every}. Set data.valid_fraction to 0.01, or train.eval_every "
                "to 0."
            )


def check_rules(rules: Mapping[str, tuple[str, ...]], mesh: MeshConfig) -> None:
    """Refuse rules and a mesh that contradict each other.

    Raises:
        ValueError: a rule names no mesh axis, a mesh axis cuts nothing, or the sequence is cut by
            an axis of one rank.
    """
    for axis, cut_by in rules.items():
        for mesh_axis in cut_by:
            if mesh_axis not in mesh.sizes:
                raise ValueError(
                    f"rules.{axis}: the mesh has no axis {mesh_axis!r}"
                    f"{did_you_mean(mesh_axis, mesh.sizes)}. Use {' or '.join(mesh.sizes)}."
                )
    used = {mesh_axis for cut_by in rules.values() for mesh_axis in cut_by}
    for mesh_axis, size in mesh.sizes.items():
        if size > 1 and mesh_axis not in used and mesh_axis != "pp":
            raise ValueError(
                f"mesh.{mesh_axis}: {size} ranks, and no rule names {mesh_axis!r}: all would do "
                f"the same work. Set mesh.{mesh_axis} to 1, or name it in a rule."
            )
    sequence = rules.get("seq_res", ())
    if sequence and all(mesh.sizes[mesh_axis] == 1 for mesh_axis in sequence):
        raise ValueError(
            f"rules.seq_res: cut by {' '.join(sequence)}, which has one rank ({mesh}); sequence "
            f"parallelism goes with tensor parallelism. Leave rules.seq_res empty, or set "
            f"mesh.{sequence[-1]} to 2 or more."
        )


def _positive(place: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{place}.{name}: {value}. Give at least 1.")
