"""Which layouts `benchmarks.multi_gpu` runs on n ranks, each as the config of a run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatree.models.gpt_config import GPTConfig
from megatree.models.moe_config import MoEConfig
from megatree.recipes.config import (
    ContextConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PipelineConfig,
    RunConfig,
    StorageConfig,
    TrainConfig,
    megatron_rules,
    moe_rules,
)
from megatree.recipes.health_config import HealthConfig
from megatree.recipes.optimizer_config import LrConfig

Zero = Literal[0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How ranks share a step.

    Args:
        mesh: ranks per axis.
        sp: whether tp cuts the residual stream too.
        zero: what storage cuts over ranks that take different tokens.
        pipeline, context: see `RunConfig`.
        experts: whether the model is a mixture.
    """

    mesh: MeshConfig
    sp: bool = False
    zero: Zero = 0
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    experts: bool = False

    def rules(self, model: GPTConfig) -> dict[str, tuple[str, ...]]:
        """Return the usual rules of a model under this cut."""
        if isinstance(model, MoEConfig):
            return moe_rules(model, sequence_parallel=self.sp)
        return megatron_rules(sequence_parallel=self.sp)


F1B = PipelineConfig(schedule="1f1b")
TWICE = PipelineConfig(schedule="interleaved", virtual=2)
ZB_H1 = PipelineConfig(schedule="zb-h1")
ZB_V = PipelineConfig(schedule="zb-v")
RING, GATHER, ALL_TO_ALL = (
    ContextConfig(attention="ring"),
    ContextConfig(attention="all-gather"),
    ContextConfig(attention="all-to-all"),
)


def dimensions(n: int) -> dict[str, Cut]:
    """Return every way to share a step over one mesh axis of n ranks."""
    return {
        "dp": Cut(mesh=MeshConfig(dp=n)),
        "dp, ZeRO-1": Cut(mesh=MeshConfig(dp=n), zero=1),
        "dp, ZeRO-2": Cut(mesh=MeshConfig(dp=n), zero=2),
        "dp, ZeRO-3": Cut(mesh=MeshConfig(dp=n), zero=3),
        "tp": Cut(mesh=MeshConfig(tp=n)),
        "tp, sp": Cut(mesh=MeshConfig(tp=n), sp=True),
        "pp, 1F1B": Cut(mesh=MeshConfig(pp=n), pipeline=F1B),
        "pp, interleaved": Cut(mesh=MeshConfig(pp=n), pipeline=TWICE),
        "pp, zero-bubble H1": Cut(mesh=MeshConfig(pp=n), pipeline=ZB_H1),
        "pp, zero-bubble V": Cut(mesh=MeshConfig(pp=n), pipeline=ZB_V),
        "cp, ring": Cut(mesh=MeshConfig(cp=n), context=RING),
        "cp, all-gather": Cut(mesh=MeshConfig(cp=n), context=GATHER),
        "cp, all-to-all": Cut(mesh=MeshConfig(cp=n), context=ALL_TO_ALL),
        "ep": Cut(mesh=MeshConfig(ep=n), experts=True),
    }


def mixes(n: int) -> dict[str, Cut]:
    """Return mixes of two axes, and of three where there are 8 ranks or more, that fill n ranks;
    none for 2 ranks.
    """
    if n < 4:
        return {}
    h = n // 2  # the other axis has 2
    found = {
        "dp tp, sp, ZeRO-1": Cut(mesh=MeshConfig(dp=h, tp=2), sp=True, zero=1),
        "dp tp, sp, ZeRO-3": Cut(mesh=MeshConfig(dp=2, tp=h), sp=True, zero=3),
        "pp tp, sp, 1F1B": Cut(mesh=MeshConfig(pp=2, tp=h), sp=True, pipeline=F1B),
        "pp dp, zero-bubble H1, ZeRO-1": Cut(
            mesh=MeshConfig(pp=h, dp=2), zero=1, pipeline=ZB_H1
        ),
        "cp tp, sp, ring": Cut(mesh=MeshConfig(cp=h, tp=2), sp=True, context=RING),
        "dp cp, all-gather, ZeRO-3": Cut(mesh=MeshConfig(dp=2, cp=h), zero=3, context=GATHER),
        "dp ep, ZeRO-1": Cut(mesh=MeshConfig(dp=2, ep=h), zero=1, experts=True),
        "ep tp, sp": Cut(mesh=MeshConfig(ep=h, tp=2), sp=True, experts=True),
    }  # fmt: skip
    if n < 8:
        return found
    q = n // 4
    return found | {
        "pp dp tp, sp, interleaved, ZeRO-1": Cut(
            mesh=MeshConfig(pp=2, dp=2, tp=q), sp=True, zero=1, pipeline=TWICE
        ),
        "dp cp tp, sp, ring, ZeRO-3": Cut(
            mesh=MeshConfig(dp=2, cp=2, tp=q), sp=True, zero=3, context=RING
        ),
        "pp cp tp, sp, all-to-all, zero-bubble V": Cut(
            mesh=MeshConfig(pp=2, cp=2, tp=q), sp=True, pipeline=ZB_V, context=ALL_TO_ALL
        ),
        "pp dp ep, 1F1B": Cut(mesh=MeshConfig(pp=2, dp=2, ep=q), pipeline=F1B, experts=True),
    }


DENSE: Mapping[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "seq_length": 32, "embed": 32, "head_dim": 8, "ffn": 64},
    "small": {"vocab_size": 8192, "seq_length": 512, "embed": 512, "head_dim": 64, "ffn": 1536},
}
"""Shape of exact steps -> its sizes: 8 key heads of 2 query heads, so that 8 ranks have one each.

"small" is what GPUs take: heads and products of usual kernels, and still seconds for one of them.
"""


def exact_config(cut: Cut, n: int, shape: str, *, limit_s: float = 600.0) -> RunConfig:
    """Return the run whose steps are compared with one rank's: float32 throughout.

    All runs of n ranks and one kind of model have the same weights and tokens: n microbatches of n
    sequences, at least 4.
    """
    sizes = DENSE[shape] | {"kv_heads": 8, "group": 2, "fused_loss": True}
    # Larger than usual, so that attention is far from even and all parts show in the loss.
    sizes |= {"init_std": 0.1 if shape == "tiny" else 0.04}
    num = max(4, n)
    model = GPTConfig(**sizes, num_layers=2 * num)
    if cut.experts:
        experts = {"experts": 16, "top_k": 2, "expert_ffn": sizes["ffn"] // 4}
        losses = {"balance": 0.05, "z_loss": 1e-3}
        # Few layers: a choice between two experts that are as good as equal may fall otherwise
        # where sums have another order, and no step with another choice is close.
        model = MoEConfig(**sizes, **experts, **losses, num_layers=4)
    return RunConfig(
        model=model,
        mesh=cut.mesh,
        rules=cut.rules(model),
        pipeline=cut.pipeline,
        context=cut.context,
        storage=StorageConfig(zero=cut.zero),
        data=DataConfig(text="mock", split="1,0,0"),
        # Plain descent: an update is the gradient itself, so the loss after it shows what arrived.
        optimizer=OptimizerConfig(
            kind="sgd", lr=0.1, min_lr=0.1, schedule=LrConfig(decay="constant"), momentum=0.0
        ),
        train=TrainConfig(steps=1, global_batch=num * num, microbatch=num),
        health=health(limit_s),
    )


def speed_cuts(n: int) -> dict[str, Cut]:
    """Return the layouts whose speed is measured on n ranks, by name; see also `mixed_cuts`."""
    if n == 1:
        return {"one": Cut(mesh=MeshConfig())}
    return {
        "dp, ZeRO-1": Cut(mesh=MeshConfig(dp=n), zero=1),
        "FSDP": Cut(mesh=MeshConfig(dp=n), zero=3),
        "tp, sp": Cut(mesh=MeshConfig(tp=n), sp=True),
    }


def mixed_cuts(n: int) -> Iterator[Cut]:
    """Yield what the best mix is chosen from: two or three of pp, dp and tp, each of 2 or more."""
    powers = [2**k for k in range(n.bit_length())]
    for pp in powers:
        for tp in powers:
            dp = n // (pp * tp)
            if pp * tp * dp != n or sum(size > 1 for size in (pp, dp, tp)) < 2:
                continue
            made = Cut(mesh=MeshConfig(pp=pp, dp=dp, tp=tp), sp=tp > 1)
            if dp == 1:
                yield made
                continue
            yield replace(made, zero=1)
            if pp == 1:  # with a pipeline, weights would be gathered for every microbatch
                yield replace(made, zero=3)


def health(limit_s: float, *, delay: int = 0) -> HealthConfig:
    """Return what tells which rank waits where, before a time limit ends all."""
    return HealthConfig(delay=delay, hang_s=0.5 * limit_s)
