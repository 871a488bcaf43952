"""Recipes: functions that return the config of a run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from megatree.models.gpt_config import GPTConfig
from megatree.models.moe_config import MoEConfig
from megatree.recipes.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PipelineConfig,
    RunConfig,
    TrainConfig,
    megatron_rules,
    moe_rules,
)
from megatree.recipes.health_config import HealthConfig
from megatree.recipes.optimizer_config import LrConfig, RampConfig, RematConfig, StorageConfig

Recipe = Callable[[], RunConfig]


def demo() -> RunConfig:
    """Return a Llama of 0.9 M parameters on the novels inside the package, for 2 CPU processes."""
    return RunConfig(
        model=GPTConfig(
            vocab_size=512,
            seq_length=128,
            num_layers=4,
            embed=128,
            kv_heads=4,
            head_dim=32,
            ffn=344,
        ),
        mesh=MeshConfig(tp=2),
        rules=megatron_rules(sequence_parallel=True),
        data=DataConfig(text="demo", tokenizer="demo", split="95,5"),
        optimizer=OptimizerConfig(lr=5e-3, min_lr=5e-4, warmup_steps=30),
        train=TrainConfig(
            steps=400,
            global_batch=16,
            microbatch=16,
            eval_every=100,
            eval_samples=128,
        ),
        checkpoint=CheckpointConfig(dir="runs/demo", every=100),
    )


def moe_demo() -> RunConfig:
    """Return a Mixtral of 2.5 M parameters (1.1 M active) on the novels inside the package, its
    experts over 2 CPU processes.
    """
    model = MoEConfig(
        vocab_size=512,
        seq_length=128,
        num_layers=4,
        embed=128,
        kv_heads=4,
        head_dim=32,
        ffn=344,
        experts=8,
        top_k=2,
        expert_ffn=172,
        balance=0.05,
        z_loss=1e-3,
    )
    return replace(
        demo(),
        model=model,
        mesh=MeshConfig(ep=2),
        rules=moe_rules(model),
        checkpoint=CheckpointConfig(dir="runs/moe-demo", every=100),
    )


def gpt2_small() -> RunConfig:
    """Return GPT-2 of 124 M parameters, ten billion tokens.

    Without dropout, as has become usual where no sample is seen twice.

    Reference: Radford et al. 2019, table 2, first row.
    """
    return RunConfig(
        model=_gpt2(embed=768, num_layers=12, num_heads=12),
        optimizer=OptimizerConfig(lr=6e-4, min_lr=6e-5, warmup_steps=700),
        train=_ten_billion_tokens(microbatch=32),
        checkpoint=CheckpointConfig(dir="runs/gpt2-small", every=1000),
        health=HealthConfig(delay=4),
        dtype="bfloat16",
        compile=True,
    )


def gpt2_345m() -> RunConfig:
    """Return GPT-2 of 345 M parameters (354.8 M when counted), ten billion tokens.

    Reference: Radford et al. 2019, table 2, second row.
    """
    return RunConfig(
        model=_gpt2(embed=1024, num_layers=24, num_heads=16),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=3e-5, warmup_steps=700),
        train=_ten_billion_tokens(microbatch=32),
        checkpoint=CheckpointConfig(dir="runs/gpt2-345m", every=1000),
        health=HealthConfig(delay=4),
        dtype="bfloat16",
        compile=True,
    )


def llama_1b() -> RunConfig:
    """Return a Llama of 956 M parameters, twenty tokens for each of them."""
    return RunConfig(
        model=_llama(
            vocab_size=32768, seq_length=4096, embed=2048, num_layers=16, num_heads=16, ffn=5632
        ),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=3e-5, warmup_steps=500),
        train=TrainConfig(
            steps=18_000,
            global_batch=256,
            microbatch=8,
            log_every=10,
            eval_every=500,
            eval_samples=64,
        ),
        checkpoint=CheckpointConfig(dir="runs/llama-1b", every=1000),
        health=HealthConfig(delay=4),
        dtype="bfloat16",
        compile=True,
    )


def llama_7b() -> RunConfig:
    """Return Llama 2 of 7 B parameters, two trillion tokens, on 8 tensor parallel ranks.

    Reference: Touvron et al. 2023, arXiv:2307.09288, table 1 and section 2.2.
    """
    return RunConfig(
        model=_llama(
            vocab_size=32000, seq_length=4096, embed=4096, num_layers=32, num_heads=32, ffn=11008
        ),
        mesh=MeshConfig(tp=8),
        rules=megatron_rules(sequence_parallel=True),
        optimizer=OptimizerConfig(lr=3e-4, min_lr=3e-5, warmup_steps=2000),
        train=TrainConfig(
            steps=480_000,
            global_batch=1024,
            microbatch=8,
            log_every=10,
            eval_every=1000,
            eval_samples=256,
        ),
        checkpoint=CheckpointConfig(dir="runs/llama-7b", every=1000),
        dtype="bfloat16",
    )


def gpt3_175b() -> RunConfig:
    """Return GPT-3 of 175 B parameters on 1024 GPUs: a growing batch, float16, cosine.

    Reference: Brown et al. 2020, table 2.1; Narayanan et al. 2021, arXiv:2104.04473, section 5.
    """
    return RunConfig(
        model=GPTConfig(
            vocab_size=50257,
            vocab_pad=1024,
            seq_length=2048,
            num_layers=96,
            embed=12288,
            kv_heads=96,
            head_dim=128,
            ffn=4 * 12288,
            norm="layer",
            positions="learned",
            activation="gelu_tanh",
            bias=True,
            tied=True,
            init_std=0.006,
        ),
        mesh=MeshConfig(pp=16, dp=8, tp=8),
        rules=megatron_rules(sequence_parallel=True),
        storage=StorageConfig(zero=1),
        remat=RematConfig(policy="selective", ops=("attention",)),
        data=DataConfig(split="949,50,1"),
        optimizer=OptimizerConfig(
            lr=6e-5,
            min_lr=6e-6,
            schedule=LrConfig(steps=430_000, warmup_fraction=0.001),
        ),
        train=TrainConfig(
            steps=500_000,
            global_batch=1536,
            microbatch=8,
            ramp=RampConfig(start=16, increment=16, samples=5_859_375),
            log_every=10,
            eval_every=1000,
            eval_samples=1536,
        ),
        checkpoint=CheckpointConfig(dir="runs/gpt3-175b", every=1000),
        dtype="float16",
    )


def llama3_8b() -> RunConfig:
    """Return Llama 3 of 8 B parameters on 64 GPUs."""
    return _llama3(
        "llama3-8b",
        model=_llama3_model(embed=4096, num_layers=32, num_heads=32, ffn=14336),
        mesh=MeshConfig(dp=32, tp=2),
        microbatch=32,
        lr=3e-4,
    )


def llama3_70b() -> RunConfig:
    """Return Llama 3 of 70 B parameters on 512 GPUs."""
    return _llama3(
        "llama3-70b",
        model=_llama3_model(embed=8192, num_layers=80, num_heads=64, ffn=28672),
        mesh=MeshConfig(pp=4, dp=16, tp=8),
        pipeline=PipelineConfig(schedule="interleaved", virtual=5),
        microbatch=16,
        lr=1.5e-4,
    )


def llama3_405b() -> RunConfig:
    """Return Llama 3 of 405 B parameters on 16,384 GPUs, 16 M tokens a step.

    Embedding and head have stages of their own, as one layer fewer at either end.

    Reference: Grattafiori et al. 2024, arXiv:2407.21783, tables 3 and 4.
    """
    return _llama3(
        "llama3-405b",
        model=_llama3_model(embed=16384, num_layers=126, num_heads=128, ffn=53248),
        mesh=MeshConfig(pp=16, dp=128, tp=8),
        pipeline=PipelineConfig(
            schedule="interleaved", virtual=8, layers_per_stage=(0, *(1,) * 126, 0)
        ),
        remat=RematConfig(
            policy="selective", ops=("attention", "norm", "activation", "rope"), regather=True
        ),
        microbatch=128,
        global_batch=2048,
        lr=8e-5,
    )


def mixtral_8x7b() -> RunConfig:
    """Return Mixtral of 46.7 B parameters (12.9 B active) on 64 GPUs, 8 ranks for the experts.

    Reference: Jiang et al. 2024, arXiv:2401.04088, table 1.
    """
    model = MoEConfig(
        vocab_size=32000,
        seq_length=4096,
        num_layers=32,
        embed=4096,
        kv_heads=8,
        group=4,
        head_dim=128,
        ffn=14336,
        rope_base=1e6,
        experts=8,
        top_k=2,
        expert_ffn=14336,
        balance=0.02,
        fused_loss=True,
    )
    return _mixture("mixtral-8x7b", model, MeshConfig(dp=8, ep=8), microbatch=64, lr=1e-4)


def qwen3_30b_a3b() -> RunConfig:
    """Return Qwen3 of 30.5 B parameters (3.3 B active) on 64 GPUs, 8 ranks for the experts.

    Reference: Qwen3, arXiv:2505.09388, table 2; its load is balanced over the global batch.
    """
    model = MoEConfig(
        vocab_size=151_936,
        seq_length=4096,
        num_layers=48,
        embed=2048,
        kv_heads=4,
        group=8,
        head_dim=128,
        ffn=6144,
        qk_norm=True,
        norm_eps=1e-6,
        rope_base=1e6,
        experts=128,
        top_k=8,
        expert_ffn=768,
        balance=1e-3,
        balance_over="global",
        fused_loss=True,
    )
    return _mixture("qwen3-30b-a3b", model, MeshConfig(dp=8, ep=8), microbatch=64, lr=3e-4)


def deepseek_v3() -> RunConfig:
    """Return DeepSeek-V3 of 671 B parameters (37 B active), and 12 B that predict one token more,
    on 2048 GPUs.

    16 stages, 64 ranks for the experts, a batch that grows. Products are in bfloat16, not float8.

    Reference: DeepSeek-V3, arXiv:2412.19437, sections 3.2, 4.2.
    """
    made = _mixture(
        "deepseek-v3",
        _deepseek_v3_model(),
        MeshConfig(pp=16, dp=2, ep=64),
        microbatch=128,
        lr=2.2e-4,
    )
    ramp = RampConfig(start=3072, increment=1536, samples=114_500_000)
    train = replace(made.train, steps=240_000, global_batch=15_360, eval_samples=1024, ramp=ramp)
    return replace(made, train=train)


def deepseek_proxy() -> RunConfig:
    """Return a model built as DeepSeek-V3, of 203 M parameters (88 M active), and 22 M that predict
    one token further, on 8 GPUs.
    """
    model = replace(
        _deepseek_v3_model(),
        vocab_size=32768,
        seq_length=2048,
        num_layers=8,
        embed=768,
        kv_heads=8,
        head_dim=64,
        kv_rank=256,
        q_rank=384,
        rope_dim=32,
        value_dim=64,
        ffn=2048,
        init_std=0.02,
        experts=32,
        top_k=4,
        expert_ffn=256,
        shared_ffn=256,
        dense_first=1,
        groups=4,
        group_top_k=2,
    )
    made = _mixture("deepseek-proxy", model, MeshConfig(dp=2, ep=4), microbatch=64, lr=1e-3)
    train = replace(made.train, steps=20_000, global_batch=256, eval_samples=256)
    return replace(made, remat=RematConfig(), train=train)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "demo": demo,
        "moe-demo": moe_demo,
        "gpt2-small": gpt2_small,
        "gpt2-345m": gpt2_345m,
        "llama-1b": llama_1b,
        "llama-7b": llama_7b,
        "gpt3-175b": gpt3_175b,
        "llama3-8b": llama3_8b,
        "llama3-70b": llama3_70b,
        "llama3-405b": llama3_405b,
        "mixtral-8x7b": mixtral_8x7b,
        "qwen3-30b-a3b": qwen3_30b_a3b,
        "deepseek-v3": deepseek_v3,
        "deepseek-proxy": deepseek_proxy,
    }
)
"""Name on the command line -> recipe."""


def _deepseek_v3_model() -> MoEConfig:
    return MoEConfig(
        vocab_size=129_280,
        seq_length=4096,
        num_layers=61,
        embed=7168,
        kv_heads=128,
        head_dim=128,
        kv_rank=512,
        q_rank=1536,
        rope_dim=64,
        value_dim=128,
        ffn=18432,
        norm_eps=1e-6,
        init_std=0.006,
        experts=256,
        top_k=8,
        expert_ffn=2048,
        shared_ffn=2048,
        dense_first=3,
        score="sigmoid",
        normalise=True,
        route_scale=2.5,
        groups=8,
        group_top_k=4,
        balance=1e-4,
        balance_over="sequence",
        bias_rate=1e-3,
        mtp=1,
        mtp_weight=0.3,
        fused_loss=True,
    )


def _gpt2(*, embed: int, num_layers: int, num_heads: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=50257,
        vocab_pad=128,
        seq_length=1024,
        num_layers=num_layers,
        embed=embed,
        kv_heads=num_heads,
        head_dim=embed // num_heads,
        ffn=4 * embed,
        norm="layer",
        positions="learned",
        activation="gelu_tanh",
        bias=True,
        tied=True,
        fused_loss=True,
    )


def _llama(
    *, vocab_size: int, seq_length: int, embed: int, num_layers: int, num_heads: int, ffn: int
) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        seq_length=seq_length,
        num_layers=num_layers,
        embed=embed,
        kv_heads=num_heads,
        head_dim=embed // num_heads,
        ffn=ffn,
        fused_loss=True,
    )


def _ten_billion_tokens(*, microbatch: int) -> TrainConfig:
    return TrainConfig(
        steps=19_073,
        global_batch=512,
        microbatch=microbatch,
        log_every=10,
        eval_every=250,
        eval_samples=256,
    )


def _llama3(
    name: str,
    *,
    model: GPTConfig,
    mesh: MeshConfig,
    microbatch: int,
    lr: float,
    pipeline: PipelineConfig = PipelineConfig(),  # noqa: B008 (frozen)
    remat: RematConfig = RematConfig(policy="selective"),  # noqa: B008 (frozen)
    global_batch: int = 512,
) -> RunConfig:
    return RunConfig(
        model=model,
        mesh=mesh,
        rules=megatron_rules(sequence_parallel=mesh.tp > 1),
        pipeline=pipeline,
        storage=StorageConfig(zero=1),
        remat=remat,
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 100, warmup_steps=8000),
        train=TrainConfig(
            steps=1_200_000,
            global_batch=global_batch,
            microbatch=microbatch,
            log_every=10,
            eval_every=1000,
            eval_samples=global_batch,
        ),
        checkpoint=CheckpointConfig(dir=f"runs/{name}", every=1000),
        dtype="bfloat16",
    )


def _llama3_model(*, embed: int, num_layers: int, num_heads: int, ffn: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=128_256,
        seq_length=8192,
        num_layers=num_layers,
        embed=embed,
        kv_heads=8,
        group=num_heads // 8,
        head_dim=128,
        ffn=ffn,
        rope_base=500_000.0,
    )


def _mixture(
    name: str, model: MoEConfig, mesh: MeshConfig, *, microbatch: int, lr: float
) -> RunConfig:
    return RunConfig(
        model=model,
        mesh=mesh,
        rules=moe_rules(model),
        storage=StorageConfig(zero=1),
        remat=RematConfig(policy="full"),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 10, warmup_steps=2000),
        train=TrainConfig(
            steps=500_000,
            global_batch=1024,
            microbatch=microbatch,
            log_every=10,
            eval_every=1000,
            eval_samples=1024,
        ),
        checkpoint=CheckpointConfig(dir=f"runs/{name}", every=1000),
        dtype="bfloat16",
    )
