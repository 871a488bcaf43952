"""What a run is: one frozen dataclass per concern, checked against each other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatree.models.gpt_config import GPTConfig
from megatree.models.moe_config import MoEConfig
from megatree.recipes.checkpoint_config import CheckpointConfig
from megatree.recipes.data_config import DataConfig
from megatree.recipes.health_config import HealthConfig, LogConfig
from megatree.recipes.optimizer_config import (
    OptimizerConfig,
    PrecisionConfig,
    RampConfig,
    RematConfig,
    StorageConfig,
)
from megatree.recipes.words import did_you_mean
from megatree.runtime.batch_ramp import BatchRamp

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Ranks per mesh axis; their product is the number of processes.

    Args:
        pp: pipeline ranks: each holds stages of layers.
        dp: data parallel ranks: each takes its rows of every microbatch.
        ep: expert parallel ranks: each holds its part of the experts, and takes its rows of every
            microbatch as those of dp do (so there are dp * ep data parallel ranks, and dp copies of
            an expert).
        cp: context parallel ranks: each takes its part of every sequence.
        tp: tensor parallel ranks: each holds its part of every weight matrix.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        _positive("mesh", pp=self.pp, dp=self.dp, ep=self.ep, cp=self.cp, tp=self.tp)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size; pp, ep and cp only if they have ranks."""
        every = {"pp": self.pp, "dp": self.dp, "ep": self.ep, "cp": self.cp, "tp": self.tp}
        return {axis: n for axis, n in every.items() if n > 1 or axis in ("dp", "tp")}

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


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """How attention runs over a cut sequence, where mesh.cp is more than 1.

    Args:
        attention: "all-gather" takes all keys and values at once, "ring" hands them round while
            they are used, "all-to-all" gives each rank some heads of the whole sequence.
        zigzag: give every rank an early and a late part of the sequence, so that a causal mask
            leaves all of them the same work.
    """

    attention: Literal["all-gather", "ring", "all-to-all"] = "all-gather"
    zigzag: bool = True


def megatron_rules(*, sequence_parallel: bool = False) -> dict[str, tuple[str, ...]]:
    """Return the usual rules: heads, feed-forward and vocabulary over tp, the batch over dp, the
    sequence over cp.

    Args:
        sequence_parallel: cut the residual stream along the sequence over tp as well.
    """
    return {
        "batch": ("dp",),
        "seq": ("cp",),
        "seq_res": ("cp", "tp") if sequence_parallel else ("cp",),
        "kv_heads": ("tp",),
        "group": (),
        "ffn": ("tp",),
        "vocab": ("tp",),
    }


def moe_rules(
    model: MoEConfig, *, sequence_parallel: bool = False, expert_tensor: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return the usual rules of a model with experts: those of `megatron_rules`, the batch over dp
    and ep, experts over ep.

    Args:
        model: rules are for the axes that it has.
        sequence_parallel: see `megatron_rules`.
        expert_tensor: cut every expert over tp; else its tp ranks are copies, each of which takes
            its part of the tokens.
    """
    rules = {
        **megatron_rules(sequence_parallel=sequence_parallel),
        "batch": ("dp", "ep"),
        "experts": ("ep",),
        "expert_ffn": ("tp",) if expert_tensor else (),
        "seq_moe": ("cp",) if expert_tensor else ("cp", "tp"),
    }
    if model.shared_ffn is not None:
        apart = expert_tensor or not model.overlap_shared
        rules["shared_ffn"] = ("tp",) if apart else ()
    if "dense" not in model.pattern:
        del rules["ffn"]
    return rules


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and rhythm of a run.

    Args:
        steps: optimizer steps, those before a resume included.
        global_batch: sequences per step.
        microbatch: sequences that go through the model at once, over all dp ranks.
        seed: of weights and dropout; that of the order of samples is data.seed.
        log_every: steps between progress lines.
        eval_every: steps between evaluations; 0 for none.
        eval_samples: held-out sequences per evaluation, always the same ones.
        ramp: how global_batch is reached by steps.
    """

    steps: int
    global_batch: int
    microbatch: int
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    eval_samples: int = 0
    ramp: RampConfig = field(default_factory=RampConfig)

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
        self.batches.check(self.microbatch)
        if self.eval_every and not self.eval_samples:
            raise ValueError(
                f"train.eval_samples: 0, but train.eval_every is {self.eval_every}. "
                f"Set train.eval_samples to {self.microbatch}, or train.eval_every to 0."
            )

    @property
    def batches(self) -> BatchRamp:
        """The global batch as a function of the samples consumed."""
        return self.ramp.resolve(self.global_batch)

    def _divides(self, name: str) -> None:
        size, part = getattr(self, name), self.microbatch
        if size % part:
            raise ValueError(
                f"train.{name}: {size} sequences are no whole number of microbatches of {part}. "
                f"Set train.{name} to {-(-size // part) * part}, or train.microbatch to "
                f"{math.gcd(size, part)}."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides a run: the same config gives the same losses, on any mesh.

    Args:
        model: sizes and choices of the decoder.
        mesh: ranks per mesh axis.
        rules: logical axis -> the mesh axes that cut it; empty for none.
        pipeline: schedule and placement, where mesh.pp is more than 1.
        context: how attention runs, where mesh.cp is more than 1.
        storage: what is cut between uses (ZeRO).
        remat: what the backward computes again.
        data: what is trained on.
        optimizer: the optimizer and its learning rate.
        precision: dtypes of gradients and masters, loss scale.
        train: length and rhythm.
        checkpoint: where the run is kept.
        health: what is looked after while it goes on.
        log: where it tells, besides metrics.jsonl.
        dtype: of parameters and products; see precision for gradients.
        compile: whether every program goes through torch.compile.
        cuda_graphs: whether forward and backward are recorded at the third step and replayed: for
            small models on one GPU, which waits for launches (`--profile` shows it as idle).
        deterministic: whether the same run gives the same bits; kernels that cannot are refused.
    """

    model: GPTConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rules: dict[str, tuple[str, ...]] = field(default_factory=megatron_rules)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    remat: RematConfig = field(default_factory=RematConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)
    dtype: Dtype = "float32"
    compile: bool = False
    cuda_graphs: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_rules(self.rules, self.mesh)
        check_experts(self.model, self.rules, self.mesh)
        self.log.tensorboard_dir(self.checkpoint.dir)
        sizes = self.mesh.sizes
        parts = math.prod(sizes.get(axis, 1) for axis in self.rules.get("batch", ()))
        if self.train.microbatch % parts:
            micro = self.train.microbatch
            raise ValueError(
                f"train.microbatch: {micro} sequences do not divide over {parts} ranks "
                f"({self.mesh}). Set train.microbatch to {-(-micro // parts) * parts}, or use "
                "fewer ranks for the batch."
            )
        if self.train.eval_every and not self.data.holds_out:
            raise ValueError(
                f"data.split: {self.data.split!r} holds nothing out, but train.eval_every is "
                f"{self.train.eval_every}. Set data.split to 969,30,1, or train.eval_every to 0."
            )
        check_zero(self.storage, self.rules, self.mesh)
        for level in ("params", "grads", "opt"):
            axes = getattr(self.storage, level)
            known = (*self.mesh.sizes, "dp", "ep", "cp", "tp")
            if wrong := [axis for axis in axes if axis not in known]:
                raise ValueError(
                    f"storage.{level}: the mesh has no axis {wrong[0]!r} to cut over. Use "
                    f"{' or '.join(axis for axis in self.mesh.sizes if axis != 'pp')}."
                )
        narrow = self.precision.grads != "float32"
        if narrow and self.train.global_batch > self.train.microbatch:
            raise ValueError(
                f"precision.grads: {self.precision.grads} sums of "
                f"{self.train.global_batch // self.train.microbatch} microbatches lose the small "
                "terms. Set precision.grads to float32, or train.microbatch to "
                f"{self.train.global_batch}."
            )
        if self.checkpoint.keep_best and not self.train.eval_every:
            raise ValueError(
                f"checkpoint.keep_best: {self.checkpoint.keep_best}, but train.eval_every is 0: no "
                "held-out loss tells which is best. Set train.eval_every, or keep_best to 0."
            )
        chunks, seq = self.mesh.cp * (2 if self.context.zigzag else 1), self.model.seq_length
        if self.mesh.cp > 1 and seq % chunks:
            raise ValueError(
                f"model.seq_length: {seq} tokens do not divide into {chunks} chunks of mesh.cp "
                f"{self.mesh.cp}. Set model.seq_length to {-(-seq // chunks) * chunks}"
                + (", or leave out context.zigzag." if seq % self.mesh.cp == 0 else ".")
            )


def data_axes(rules: Mapping[str, tuple[str, ...]], mesh: MeshConfig) -> tuple[str, ...]:
    """Return the mesh axes whose ranks take different tokens, in the mesh's order: those of several
    ranks that cut the batch or the sequence.
    """
    cut_by = {*rules.get("batch", ()), *rules.get("seq", ())}
    return tuple(axis for axis, size in mesh.sizes.items() if size > 1 and axis in cut_by)


def check_zero(
    storage: StorageConfig, rules: Mapping[str, tuple[str, ...]], mesh: MeshConfig
) -> None:
    """Refuse a `zero` that would cut nothing.

    Raises:
        ValueError: no ranks take different tokens.
    """
    if storage.zero and not data_axes(rules, mesh):
        raise ValueError(
            f"storage.zero: {storage.zero} cuts over ranks that take different tokens, and this "
            f"mesh has none ({mesh}). Set storage.zero to 0, or mesh.dp to 2 or more."
        )


def check_rules(rules: Mapping[str, tuple[str, ...]], mesh: MeshConfig) -> None:
    """Refuse rules and a mesh that contradict each other.

    Raises:
        ValueError: a rule names no mesh axis, a mesh axis cuts nothing, or the sequence is cut by
            an axis of one rank.
    """
    for axis, cut_by in rules.items():
        for mesh_axis in cut_by:
            if mesh_axis not in (*mesh.sizes, "ep", "cp"):
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
    sequence = [mesh_axis for mesh_axis in rules.get("seq_res", ()) if mesh_axis != "cp"]
    if sequence and all(mesh.sizes[mesh_axis] == 1 for mesh_axis in sequence):
        raise ValueError(
            f"rules.seq_res: cut by {' '.join(sequence)}, which has one rank ({mesh}); sequence "
            f"parallelism goes with tensor parallelism. Leave rules.seq_res empty, or set "
            f"mesh.{sequence[-1]} to 2 or more."
        )


def check_experts(model: GPTConfig, rules: Mapping[str, tuple[str, ...]], mesh: MeshConfig) -> None:
    """Refuse a mesh that experts do not divide over, or whose ranks would not send them tokens.

    Raises:
        ValueError: experts do not divide over their ranks; their mesh axes do not all cut tokens;
            or there are expert parallel ranks and no experts.
    """
    if not isinstance(model, MoEConfig):
        if mesh.ep > 1:
            raise ValueError(
                f"mesh.ep: {mesh.ep} ranks for experts, and the model has none. Set mesh.ep to 1, "
                "and mesh.dp to as many."
            )
        return
    axes = [axis for axis in rules.get("experts", ()) if mesh.sizes.get(axis, 1) > 1]
    parts = math.prod(mesh.sizes[axis] for axis in axes)
    if model.experts % parts:
        fit = next(n for n in range(min(parts, model.experts), 0, -1) if model.experts % n == 0)
        raise ValueError(
            f"model.experts: {model.experts} experts do not divide over {parts} ranks "
            f"({' '.join(axes)}, of {mesh}). Use {fit} ranks for experts, or "
            f"{-(-model.experts // parts) * parts} experts."
        )
    tokens = {*rules.get("batch", ()), *rules.get("seq_moe", ())}
    if wrong := [axis for axis in axes if axis not in tokens]:
        raise ValueError(
            f"rules.experts: cut by {wrong[0]!r}, which cuts neither rules.batch "
            f"({' '.join(rules.get('batch', ())) or 'none'}) nor rules.seq_moe "
            f"({' '.join(rules.get('seq_moe', ())) or 'none'}): its ranks would send the same "
            f"tokens. Add {wrong[0]!r} to rules.batch or rules.seq_moe."
        )


def _positive(place: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{place}.{name}: {value}. Give at least 1.")
