"""Sizes and choices of the dense decoder, as a value that a command line reads without torch."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

Norm = Literal["rms", "layer"]
Positions = Literal["rotary", "learned"]
Activation = Literal["swiglu", "gelu", "gelu_tanh", "squared_relu"]

AttentionKernel = Literal["auto", "reference", "sdpa", "flash", "flash_attn", "fa4", "cudnn"]

_CHOICES = {
    "norm": Norm,
    "positions": Positions,
    "activation": Activation,
    "attention_kernel": AttentionKernel,
}
_POSITIVE = ("norm_eps", "rope_base", "init_std")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes and choices of a dense decoder.

    Args:
        vocab_size: number of tokens that exist.
        seq_length: tokens per sequence (the longest, with learned positions).
        num_layers: number of blocks.
        embed: width of the residual stream.
        kv_heads: number of key heads; a query head per key head and group.
        group: query heads per key head.
        head_dim: width of a head; with kv_rank, of that part of a query or key that does not turn.
        ffn: width of the feed-forward layer.
        norm: RMSNorm or LayerNorm, before each half of a block and before the head.
        positions: rotary, or a learned table added to the embedding.
        activation: of the feed-forward layer; "swiglu" is the gated one.
        bias: whether products and LayerNorms have one.
        qkv_bias: whether the products that make queries, keys and values have one (as Qwen2).
        qk_norm: whether queries and keys are normalised over head_dim before they turn (as Qwen3).
        window: a token sees tokens less than this many before it (as Mistral); None for all.
        kv_rank: width of the latent that all keys and values are made of (as DeepSeek-V2: see
            `latent_heads`); None makes them of the residual stream.
        q_rank: with kv_rank, width of the latent that queries are made of; None for none.
        rope_dim: with kv_rank, elements of a query or key that turn, those of keys being the same
            for all heads.
        value_dim: with kv_rank, width of a value.
        yarn: with kv_rank, (factor, fast, slow, length, scale, scale_all): the first four are those
            of `rope_table`; what turns grows by m(scale) / m(scale_all) and all scores by
            m(scale_all)^2, where m(x) = 0.1 x ln(factor) + 1. None for none.
        mtp: further tokens that are predicted, each by a layer of its own behind the others (as
            DeepSeek-V3: see `with_mtp`); None for none.
        mtp_weight: what their losses, averaged over them, count for.
        tied: whether the head reads the embedding's table.
        dropout: rate on the embedding and on what each half of a block adds.
        attention_dropout: rate on attention weights.
        attention_kernel: what computes attention, see `F.attention`; "auto" is what fits.
        norm_eps: added to mean squares and variances.
        rope_base: see `rope_table`.
        rope_scaling: (factor, low, high, length) of `rope_table` (as Llama 3.1), or None.
        vocab_pad: the table is allocated at the next multiple of this many rows.
        fused_loss: whether head and loss are one op, for which logits never exist as a whole.
        init_std: standard deviation of the first weights; of those that write to the residual
            stream, it is divided by sqrt(2 num_layers).

    Raises:
        ValueError: a size is not positive, a choice unknown, or two fields contradict.
    """

    vocab_size: int
    seq_length: int
    num_layers: int
    embed: int
    kv_heads: int
    group: int = 1
    head_dim: int
    ffn: int
    norm: Norm = "rms"
    positions: Positions = "rotary"
    activation: Activation = "swiglu"
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    kv_rank: int | None = None
    q_rank: int | None = None
    rope_dim: int | None = None
    value_dim: int | None = None
    yarn: tuple[float, float, float, float, float, float] | None = None
    mtp: int | None = None
    mtp_weight: float = 0.3
    tied: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention_kernel: AttentionKernel = "auto"
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: tuple[float, float, float, float] | None = None
    vocab_pad: int = 1
    fused_loss: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                ours = field.name in {own.name for own in fields(GPTConfig)}
                owner = "GPTConfig" if ours else type(self).__name__
                raise ValueError(f"{owner}: {field.name} is {value}. Give at least 1.")
            if field.name in _CHOICES and value not in (known := get_args(_CHOICES[field.name])):
                raise ValueError(
                    f"GPTConfig: {field.name} is {value!r}. Use one of {', '.join(known)}."
                )
            if field.name in ("dropout", "attention_dropout") and not 0.0 <= value < 1.0:
                raise ValueError(f"GPTConfig: {field.name} is {value}. Give a rate in [0, 1).")
            if field.name in _POSITIVE and not 0.0 < value < math.inf:
                raise ValueError(f"GPTConfig: {field.name} is {value}. Give a positive number.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"GPTConfig: window is {self.window}. Give at least 1, or None.")
        if self.mtp is not None and (self.mtp < 1 or not 0.0 < self.mtp_weight < math.inf):
            raise ValueError(
                f"GPTConfig: mtp is {self.mtp} with mtp_weight {self.mtp_weight}. Give positive "
                "numbers, or mtp=None."
            )
        if self.kv_rank is not None:
            self._check_latent()
            return
        for name in ("q_rank", "rope_dim", "value_dim", "yarn"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"GPTConfig: {name} is {getattr(self, name)} without kv_rank, and only latent "
                    f"attention has it. Give kv_rank, or take {name}=None."
                )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"GPTConfig: head_dim is {self.head_dim}, and rotary positions turn pairs. "
                "Make head_dim even."
            )

    def _check_latent(self) -> None:
        for name in ("kv_rank", "rope_dim", "value_dim", "q_rank"):
            value = getattr(self, name)
            if (value is None and name != "q_rank") or (value is not None and value < 1):
                raise ValueError(
                    f"GPTConfig: {name} is {value} with kv_rank {self.kv_rank}. Give at least 1."
                )
        assert self.rope_dim is not None
        if self.rope_dim % 2:
            raise ValueError(
                f"GPTConfig: rope_dim is {self.rope_dim}, and rotary positions turn pairs. "
                "Make rope_dim even."
            )
        known = {"group": 1, "positions": "rotary", "rope_scaling": None}
        known |= dict.fromkeys(("bias", "qkv_bias", "qk_norm"), False)
        for name, value in known.items():
            if (given := getattr(self, name)) != value:
                raise ValueError(
                    f"GPTConfig: {name} is {given!r} with kv_rank {self.kv_rank}, and latent "
                    f"attention has {value!r}. Take {name}={value!r}."
                )

    @property
    def num_heads(self) -> int:
        """The number of query heads."""
        return self.kv_heads * self.group

    @property
    def random(self) -> bool:
        """Whether a step needs a key."""
        return self.dropout > 0.0 or self.attention_dropout > 0.0
