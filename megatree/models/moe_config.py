"""Sizes and choices of a decoder with experts, as a value that a command line reads without
torch.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from megatree.models.gpt_config import GPTConfig

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Balance = Literal["microbatch", "sequence"]
Products = Literal["auto", "loop", "grouped"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig(GPTConfig):
    """Sizes and choices of a decoder some of whose layers are mixtures of experts.

    Args:
        experts: experts of a layer.
        top_k: experts that a token takes.
        expert_ffn: width of an expert; `ffn` is that of the dense layers.
        shared_ffn: width of the expert that every token takes; None for none.
        dense_first: this many first layers are dense; None for none.
        every: of the layers after them, the first and every `every`-th from it are mixtures.
        score, pre_softmax, normalise, route_scale, groups, group_top_k: see `route`.
        balance: coefficient of the auxiliary loss (see `balance_loss`); None for none.
        balance_over: over whose tokens it is taken: those of a microbatch on all data axes, or
            those of every sequence by itself.
        z_loss: coefficient of `router_z_loss`; None for none.
        capacity_factor: an expert takes at most ceil(seq * top_k / experts * factor) tokens of one
            sequence, the heaviest ones; None drops no token.
        pad_to_capacity: whether rows are padded to the capacity, so that all shapes are static and
            the host waits for nothing. It changes no value.
        products: see `expert_rows`.

    Raises:
        ValueError: a size is not positive, a choice unknown, or fields contradict.
    """

    experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int | None = None
    dense_first: int | None = None
    every: int = 1
    score: Score = "softmax"
    pre_softmax: bool = False
    normalise: bool | None = None
    route_scale: float = 1.0
    groups: int | None = None
    group_top_k: int | None = None
    balance: float | None = None
    balance_over: Balance = "microbatch"
    z_loss: float | None = None
    capacity_factor: float | None = None
    pad_to_capacity: bool = False
    products: Products = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (("score", Score), ("balance_over", Balance), ("products", Products))
        for name, known in choices:
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(
                    f"MoEConfig: {name} is {value!r}. Use one of {', '.join(get_args(known))}."
                )
        if self.top_k > self.experts:
            raise ValueError(
                f"MoEConfig: top_k is {self.top_k}, and there are {self.experts} experts. "
                f"Give at most {self.experts}."
            )
        for name in ("balance", "z_loss", "capacity_factor", "route_scale"):
            if (value := getattr(self, name)) is not None and value <= 0.0:
                raise ValueError(f"MoEConfig: {name} is {value}. Give a positive number.")
        if self.shared_ffn is not None and self.shared_ffn < 1:
            raise ValueError(f"MoEConfig: shared_ffn is {self.shared_ffn}. Give at least 1.")
        if self.dense_first is not None and not 0 <= self.dense_first < self.num_layers:
            raise ValueError(
                f"MoEConfig: dense_first is {self.dense_first} of {self.num_layers} layers. "
                "Leave at least one layer to be a mixture."
            )
        if self.pad_to_capacity and self.capacity_factor is None:
            raise ValueError(
                "MoEConfig: pad_to_capacity without capacity_factor: without a capacity no token "
                "is dropped, and there is nothing to pad to. Give a capacity_factor, or take "
                "pad_to_capacity=False."
            )
        if self.pad_to_capacity and self.products != "auto":
            raise ValueError(
                f"MoEConfig: products is {self.products!r} with pad_to_capacity, where experts "
                "have equal rows and one batched product. Take products='auto'."
            )
        if self.activation != "swiglu" and self.shared_ffn is not None:
            raise ValueError(
                f"MoEConfig: shared_ffn with activation {self.activation!r}. A shared expert is "
                "gated: take activation='swiglu'."
            )
        if self.bias:
            raise ValueError(
                "MoEConfig: bias=True, and experts have none. Take bias=False (qkv_bias=True gives "
                "queries, keys and values one)."
            )

    @property
    def pattern(self) -> tuple[str, ...]:
        """The kind of every layer, "dense" or "moe"."""
        first = self.dense_first or 0
        return tuple(
            "moe" if i >= first and (i - first) % self.every == 0 else "dense"
            for i in range(self.num_layers)
        )
