"""Sizes and choices of a decoder with experts, as a value that a command line reads without
torch.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatree.models.gpt_config import GPTConfig

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Router = Literal["top_k", "sinkhorn"]
Balance = Literal["microbatch", "sequence", "global"]
Products = Literal["auto", "loop", "grouped", "transformer_engine"]


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
        router: "top_k" takes the best scores; "sinkhorn" the best of scores that `sinkhorn` evens
            out over the tokens of a microbatch, and in evaluation the best scores.
        score, pre_softmax, normalise, route_scale, groups, group_top_k: see `route`.
        jitter: the router's input is multiplied by numbers drawn evenly from [1 - jitter,
            1 + jitter), in training; None for none.
        balance: coefficient of the auxiliary loss (see `balance_loss`); None for none.
        balance_over: over whose tokens it is taken: those of a "microbatch" on all data axes, those
            of every "sequence" by itself, or all of a step ("global"). The last costs one more
            forward of all microbatches if there are several, to count the choices first.
        bias_rate: experts are chosen by score + bias, and after a step the bias of every expert
            goes up by this if it had fewer tokens than the mean, down if more (see `bias_move`); 0
            leaves it as it is; None for no bias.
        z_loss: coefficient of `router_z_loss`; None for none.
        capacity_factor: an expert takes at most ceil(seq * top_k / experts * factor) tokens of one
            sequence, the heaviest ones; None drops no token.
        pad_to_capacity: whether rows are padded to the capacity, so that all shapes are static and
            the host waits for nothing. It changes no value.
        products: see `expert_rows`.
        overlap_shared: whether the shared expert is computed while rows travel to their experts
            (see `experts`). It changes no value; the mesh axes of shared_ffn must then not cut
            "seq_moe".

    Raises:
        ValueError: a size is not positive, a choice unknown, or fields contradict.
    """

    experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int | None = None
    dense_first: int | None = None
    every: int = 1
    router: Router = "top_k"
    score: Score = "softmax"
    pre_softmax: bool = False
    normalise: bool | None = None
    route_scale: float = 1.0
    groups: int | None = None
    group_top_k: int | None = None
    jitter: float | None = None
    balance: float | None = None
    balance_over: Balance = "microbatch"
    bias_rate: float | None = None
    z_loss: float | None = None
    capacity_factor: float | None = None
    pad_to_capacity: bool = False
    products: Products = "auto"
    overlap_shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (
            ("router", Router),
            ("score", Score),
            ("balance_over", Balance),
            ("products", Products),
        )
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
        if self.pre_softmax and self.score != "softmax":
            raise ValueError(
                f"MoEConfig: pre_softmax with score {self.score!r}, and only a softmax is taken "
                "over all experts or over those of a token. Take pre_softmax=False."
            )
        self._check_router()
        for name in ("balance", "z_loss", "capacity_factor", "route_scale"):
            if (value := getattr(self, name)) is not None and not 0.0 < value < math.inf:
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
        if self.overlap_shared and self.shared_ffn is None:
            raise ValueError(
                "MoEConfig: overlap_shared without shared_ffn: there is no shared expert to "
                "compute meanwhile. Give shared_ffn, or take overlap_shared=False."
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

    def _check_router(self) -> None:
        """Refuse ways to balance that contradict each other."""
        if self.jitter is not None and not 0.0 < self.jitter < 1.0:
            raise ValueError(f"MoEConfig: jitter is {self.jitter}. Give a number in (0, 1).")
        if self.bias_rate is not None and not 0.0 <= self.bias_rate < math.inf:
            raise ValueError(f"MoEConfig: bias_rate is {self.bias_rate}. Give 0 or more.")
        if self.router != "sinkhorn":
            return
        others = {
            "balance": self.balance,
            "bias_rate": self.bias_rate,
            "groups": self.groups,
        }
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"MoEConfig: router is 'sinkhorn' with {name} {value}, and its choice is even "
                    f"by itself. Leave out {name}, or take router='top_k'."
                )

    def for_evaluation(self) -> "MoEConfig":
        """Return it without what only training does.

        Its loss is that of the language alone. No token is dropped: who is dropped is decided over
        whole sequences, so that tokens to come would decide about those before.
        """
        return replace(
            self,
            dropout=0.0,
            attention_dropout=0.0,
            router="top_k",
            jitter=None,
            balance=None,
            z_loss=None,
            capacity_factor=None,
            pad_to_capacity=False,
        )

    @property
    def random(self) -> bool:
        """Whether a step needs a key."""
        return super().random or self.jitter is not None

    @property
    def pattern(self) -> tuple[str, ...]:
        """The kind of every layer, "dense" or "moe"."""
        first = self.dense_first or 0
        return tuple(
            "moe" if i >= first and (i - first) % self.every == 0 else "dense"
            for i in range(self.num_layers)
        )
