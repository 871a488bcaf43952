"""Recipes: functions that return the config of a run."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megatree.models import GPTConfig
from megatree.recipes.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    megatron_rules,
)

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
        data=DataConfig(text="demo", tokenizer="demo", valid_fraction=0.05),
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
        dtype="bfloat16",
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
        dtype="bfloat16",
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
        dtype="bfloat16",
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


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "demo": demo,
        "gpt2-small": gpt2_small,
        "gpt2-345m": gpt2_345m,
        "llama-1b": llama_1b,
        "llama-7b": llama_7b,
    }
)
"""Name on the command line -> recipe."""


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
