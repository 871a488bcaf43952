"""How a run updates its weights: optimizer, learning rate, precision, storage."""

from dataclasses import dataclass, field, replace
from typing import Literal

from megatree.runtime.batch_ramp import BatchRamp
from megatree.runtime.lr_schedule import Fraction, LrSchedule, Samples, Steps, lr_schedule

Kind = Literal["adamw", "sgd", "lion", "muon"]


@dataclass(frozen=True, kw_only=True)
class LrConfig:
    """Shape of the learning rate between its largest and its least value.

    Args:
        decay: after the warm-up.
        steps: where min_lr is reached, warm-up included; 0 for train.steps.
        samples: the same in sequences, which counts the whole schedule in sequences.
        warmup_steps: steps of the warm-up.
        warmup_samples: the same in sequences, with samples.
        warmup_fraction: the same as a share of the whole schedule.
        anneal_fraction: with "wsd", the share at the end in which the rate comes down.
        anneal: shape of that part.
    """

    decay: Literal["constant", "linear", "cosine", "inverse_square_root", "wsd"] = "cosine"
    steps: int = 0
    samples: int = 0
    warmup_steps: int = 0
    warmup_samples: int = 0
    warmup_fraction: float = 0.0
    anneal_fraction: float = 0.0
    anneal: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"

    def __post_init__(self) -> None:
        counts = {
            "steps": self.steps,
            "samples": self.samples,
            "warmup_steps": self.warmup_steps,
            "warmup_samples": self.warmup_samples,
        }
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"optimizer.schedule.{name}: {value}. Give at least 0.")
        given = [
            n for n in ("warmup_steps", "warmup_samples", "warmup_fraction") if getattr(self, n)
        ]
        if len(given) > 1:
            raise ValueError(
                f"optimizer.schedule: {' and '.join(given)} both say how long the warm-up is. "
                f"Keep {given[0]}."
            )
        if self.samples and (self.steps or self.warmup_steps):
            raise ValueError(
                "optimizer.schedule: counted in samples, but steps or warmup_steps are given. Use "
                "warmup_samples or warmup_fraction, or count all in steps."
            )
        if self.warmup_samples and not self.samples:
            raise ValueError(
                f"optimizer.schedule.warmup_samples: {self.warmup_samples}, but the schedule "
                "counts steps. Set optimizer.schedule.samples, or give warmup_steps."
            )

    def resolve(self, lr: float, min_lr: float, steps: int) -> LrSchedule:
        """Return the schedule of a run of so many steps; its first step does not stand still.

        A run that ends within its warm-up has the rates that a longer one begins with.
        """
        length = Samples(self.samples) if self.samples else Steps(self.steps or steps)
        if not self.samples and not self.steps:
            length = Steps(max(steps, self.warmup_steps + 1))
        unit = Samples if self.samples else Steps
        count = self.warmup_samples or self.warmup_steps
        warmup = Fraction(self.warmup_fraction) if self.warmup_fraction else unit(count)
        endless = self.decay == "constant" and not self.warmup_fraction
        plain = lr_schedule(
            lr,
            decay=self.decay,
            length=None if endless else length,
            warmup=warmup,
            min_lr=min_lr,
            anneal=Fraction(self.anneal_fraction) if self.anneal_fraction else None,
            anneal_shape=self.anneal,
        )
        if not plain.warmup or self.samples:
            return plain
        return replace(plain, init_lr=lr / (plain.warmup + 1.0))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its numbers.

    Args:
        kind: "muon" orthogonalises the blocks' matrices and leaves other leaves to AdamW.
        lr: learning rate after the warm-up.
        min_lr: least learning rate after it.
        warmup_steps: steps of the warm-up, a short form of schedule.warmup_steps.
        schedule: shape of the learning rate.
        betas: decay of the first and second moment (AdamW, Lion).
        momentum: decay of the momentum (SGD, Muon).
        eps: added to the root of the second moment.
        weight_decay: times lr, taken off the matrices.
        end_weight_decay: what weight decay rises to by the end along half a cosine; None keeps it.
        lr_of: pattern of leaf paths ("embed.*") -> factor of the learning rate.
        no_decay: patterns of leaf paths without weight decay, beside norms and biases.
        moments: dtype of the optimizer's state.
        clip: largest global norm of the gradients; None leaves them.
        clip_value: largest absolute value of an element of the gradients; None leaves them.
        ema: decay of an average of the weights kept beside them; 0 keeps none.
    """

    kind: Kind = "adamw"
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    schedule: LrConfig = field(default_factory=LrConfig)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    end_weight_decay: float | None = None
    lr_of: dict[str, float] = field(default_factory=dict)
    no_decay: tuple[str, ...] = ()
    moments: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = 1.0
    clip_value: float | None = None
    ema: float = 0.0

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
        for name in ("momentum", "ema"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"optimizer.{name}: {getattr(self, name)} is no decay. Use one in [0, 1)."
                )
        if self.clip is not None and self.clip <= 0.0:
            raise ValueError(
                f"optimizer.clip: no norm is below {self.clip}. Use a positive one, or None."
            )
        if self.clip_value is not None and self.clip_value <= 0.0:
            raise ValueError(
                f"optimizer.clip_value: no element is within {self.clip_value}. Use a positive "
                "one, or None."
            )
        if self.end_weight_decay is not None and self.end_weight_decay < self.weight_decay:
            raise ValueError(
                f"optimizer.end_weight_decay: {self.end_weight_decay} is below weight_decay "
                f"{self.weight_decay}. Set it to at least {self.weight_decay}."
            )
        if self.warmup_steps and (self.schedule.warmup_steps or self.schedule.warmup_samples):
            raise ValueError(
                f"optimizer.warmup_steps: {self.warmup_steps}, and optimizer.schedule has a "
                "warm-up of its own. Keep one."
            )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What is added up, sent and kept in which dtype; the model's own is `dtype`.

    Args:
        grads: dtype in which gradients are added up; bfloat16 only with one microbatch a step.
        reduce: dtype in which gradients travel; "" is that of grads.
        master: whether bfloat16 or float16 weights have a float32 copy that updates work on.
        rounding: how updates without a copy are rounded.
        loss_scale: "dynamic", "none" or a number; "auto" is dynamic for float16 and none else.
        matmul: float32 products: "highest" keeps all bits of their factors, "high" lets a GPU round
            them to TF32.
        narrow_sums: whether cuBLAS may add the parts of a long sum of a bfloat16 or float16 product
            in that dtype (within a part sums are float32).
    """

    grads: Literal["float32", "bfloat16", "float16"] = "float32"
    reduce: Literal["", "float32", "bfloat16"] = ""
    master: bool = True
    rounding: Literal["nearest", "stochastic"] = "nearest"
    loss_scale: str = "auto"
    matmul: Literal["highest", "high"] = "highest"
    narrow_sums: bool = True

    def __post_init__(self) -> None:
        if self.loss_scale not in ("auto", "dynamic", "none"):
            try:
                positive = float(self.loss_scale) > 0.0
            except ValueError:
                positive = False
            if not positive:
                raise ValueError(
                    f"precision.loss_scale: {self.loss_scale!r}. Use auto, dynamic, none or a "
                    "positive number."
                )
        if self.master and self.rounding == "stochastic":
            raise ValueError(
                "precision.rounding: stochastic is for weights without a float32 copy. Set "
                "precision.master to False, or rounding to nearest."
            )


Zero = Literal[0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Mesh axes that cut weights, gradients and optimizer state between uses.

    Args:
        zero: 1 cuts the optimizer's state over all ranks that take different tokens (dp, ep and
            cp), 2 gradients too, 3 weights too; 0 goes by the axes below.
        params, grads, opt: mesh axes; each begins with those before.
    """

    zero: Zero = 0
    params: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    opt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.zero and (self.params or self.grads or self.opt):
            raise ValueError(
                f"storage.zero: {self.zero} says what is cut over dp, ep and cp, and axes are "
                "given too. Set storage.zero to 0, or leave the axes out."
            )

    def axes(
        self, data: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Return the mesh axes of weights, gradients and optimizer state.

        Args:
            data: mesh axes over which `zero` cuts (see `data_axes`).
        """
        if not self.zero:
            return self.params, self.grads, self.opt
        return tuple(data if self.zero >= least else () for least in (3, 2, 1))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """A global batch that grows: (start, increment, samples) as in the GPT-3 recipe.

    Args:
        start: sequences of the first step; 0 for no ramp.
        increment: sequences by which it grows at a time.
        samples: consumed sequences from which on it is train.global_batch.
    """

    start: int = 0
    increment: int = 0
    samples: int = 0

    def resolve(self, global_batch: int) -> BatchRamp:
        """Return the batch as a function of the samples consumed."""
        if not self.start:
            return BatchRamp.constant(global_batch)
        return BatchRamp(
            start=self.start, increment=self.increment, samples=self.samples, final=global_batch
        )


@dataclass(frozen=True, kw_only=True)
class RematConfig:
    """What the layers compute again in the backward instead of keeping it.

    Args:
        policy: "selective" runs the named ops again, "full" whole layers.
        ops: families of ops, with "selective".
        regather: with "selective", gather along a cut sequence again instead of keeping it.
        method: with "full", "uniform" groups the layers of a stage by `layers`, "block" runs the
            first `layers` of each stage again.
        layers: see method.
        offload: move what layers keep to host memory meanwhile.
        keep_weights: keep gathered weights (storage.zero 3) until the backward.
    """

    policy: Literal["none", "selective", "full"] = "none"
    ops: tuple[str, ...] = ("attention", "norm", "activation")
    regather: bool = False
    method: Literal["uniform", "block"] = "uniform"
    layers: int = 1
    offload: bool = False
    keep_weights: bool = False
