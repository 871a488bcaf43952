"""Routing as pure functions: which experts a token takes, how heavily, and how even that is."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatree.functional.op import op

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]

_TINY = 1e-20
"""Added to sums of scores that divide, so that scores that all vanish give 0."""


def _signature(ranks: Sequence[int]) -> str:
    return "... e!, e! -> ... k, ... k" if len(ranks) == 2 else "... e! -> ... k, ... k"


@op(_signature)
def route(
    logits: Float[Tensor, "*n e"],
    bias: Float[Tensor, " e"] | None = None,
    *,
    k: int,
    score: Score = "softmax",
    pre_softmax: bool = False,
    normalise: bool | None = None,
    scale: float = 1.0,
    groups: int | None = None,
    group_top_k: int | None = None,
) -> tuple[Float[Tensor, "*n k"], Int[Tensor, "*n k"]]:
    """Choose k experts for every token, in float32 or better.

    Args:
        logits: [..., experts].
        bias: [experts], added where experts are chosen and not where they are weighed; carries no
            gradient (see `updated_bias`).
        k: experts per token.
        score: how logits become scores. "softmax" is taken over the chosen logits, with
            `pre_softmax` over all of them before the choice.
        normalise: whether the weights of a token are divided by their sum; None does it for scores
            other than softmax if k > 1. A softmax over the chosen ones has the sum 1 already.
        scale: multiplies the weights.
        groups: the experts lie in this many groups of neighbours, of which a token may take
            `group_top_k`: those with the largest sums of their best k / group_top_k scores.
        group_top_k: see `groups`.

    Returns:
        (weights, experts), both [..., k], largest score first; experts are numbered from 0.

    Raises:
        ValueError: k is larger than the experts (or than those of the groups), groups do not
            divide them, or k = 1 with a softmax over one logit, which has no gradient.

    Reference: Shazeer et al. 2017, arXiv:1701.06538; groups and bias: DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2.
    """
    num_experts = logits.shape[-1]
    check_choice(num_experts, k, score, pre_softmax, groups, group_top_k)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide if score == "softmax" and not pre_softmax else _scores(wide, score)
    ranked = scores.detach()
    if bias is not None:
        ranked = ranked + bias.detach()
    if groups is not None and group_top_k is not None:
        ranked = _limited(ranked, k, groups, group_top_k)
    experts = torch.topk(ranked, k, dim=-1).indices
    return _weights(scores, experts, score, pre_softmax, normalise, scale), experts


@op("... e!, ... k! -> ... k")
def weigh(
    logits: Float[Tensor, "*n e"],
    experts: Int[Tensor, "*n k"],
    *,
    score: Score = "softmax",
    pre_softmax: bool = False,
    normalise: bool | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*n k"]:
    """Return the weights that `route` gives to experts which something else has chosen."""
    k = experts.shape[-1]
    check_choice(logits.shape[-1], k, score, pre_softmax)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide if score == "softmax" and not pre_softmax else _scores(wide, score)
    return _weights(scores, experts, score, pre_softmax, normalise, scale)


def _weights(
    scores: Tensor,
    experts: Tensor,
    score: Score,
    pre_softmax: bool,
    normalise: bool | None,
    scale: float,
) -> Tensor:
    weights = scores.gather(-1, experts)
    if score == "softmax" and not pre_softmax:
        weights = torch.softmax(weights, dim=-1)
    elif normalise or (normalise is None and score != "softmax" and experts.shape[-1] > 1):
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return weights if scale == 1.0 else weights * scale


def check_choice(
    num_experts: int,
    k: int,
    score: Score = "softmax",
    pre_softmax: bool = False,
    groups: int | None = None,
    group_top_k: int | None = None,
) -> None:
    """Refuse a choice that cannot be made.

    Raises:
        ValueError: see `route`.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"route: k is {k}, and there are {num_experts} experts. Choose from 1 to {num_experts}."
        )
    if k == 1 and score == "softmax" and not pre_softmax:
        raise ValueError(
            "route: k is 1, and the softmax of one logit is 1 whatever the logit: the router would "
            "have no gradient. Set pre_softmax=True."
        )
    if (groups is None) != (group_top_k is None):
        raise ValueError(
            f"route: groups is {groups}, group_top_k is {group_top_k}. Give both or none."
        )
    if groups is None or group_top_k is None:
        return
    if groups < 1 or num_experts % groups or not 1 <= group_top_k <= groups:
        raise ValueError(
            f"route: {group_top_k} of {groups} groups of {num_experts} experts. Choose groups that "
            "divide the experts, and group_top_k from 1 to groups."
        )
    size = num_experts // groups
    if k % group_top_k or k // group_top_k > size:
        raise ValueError(
            f"route: k is {k}, over {group_top_k} groups of {size} experts. Make k a multiple of "
            f"group_top_k, at most {group_top_k * size}."
        )


def _scores(wide: Tensor, score: Score) -> Tensor:
    if score == "softmax":
        return torch.softmax(wide, dim=-1)
    if score == "sigmoid":
        return torch.sigmoid(wide)
    if score == "sqrtsoftplus":
        return torch.nn.functional.softplus(wide).sqrt()
    raise ValueError(f"route: score is {score!r}. Use softmax, sigmoid or sqrtsoftplus.")


def _limited(ranked: Tensor, k: int, groups: int, group_top_k: int) -> Tensor:
    """Put the experts of all but the best groups out of reach."""
    parted = ranked.unflatten(-1, (groups, ranked.shape[-1] // groups))
    best = torch.topk(parted, k // group_top_k, dim=-1).values.sum(-1)
    kept = torch.topk(best, group_top_k, dim=-1).indices
    number = torch.arange(groups, device=ranked.device)
    allowed = (kept.unsqueeze(-1) == number).sum(-2) > 0
    return torch.where(allowed.unsqueeze(-1), parted, -math.inf).flatten(-2)


@op("... e! -> ... e")
def router_probabilities(
    logits: Float[Tensor, "*n e"], *, score: Score = "softmax"
) -> Float[Tensor, "*n e"]:
    """Return the scores of all experts with the sum 1, in float32 or better, for `balance_loss`."""
    scores = _scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), score)
    return scores if score == "softmax" else scores / (scores.sum(-1, keepdim=True) + _TINY)


@op("... t+ k+ -> ... e")
def expert_counts(
    experts: Int[Tensor, "*n t k"], *, num_experts: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*n e"]:
    """Count the tokens of every expert, per leading index; a number that is no expert counts not.

    Cut along tokens it is a pending sum: `shard` it before it is used but linearly.

    >>> expert_counts(torch.tensor([[0, 1], [0, 2], [3, 3]]), num_experts=3).tolist()
    [2.0, 1.0, 1.0]
    """
    number = torch.arange(num_experts, device=experts.device)
    return (experts.unsqueeze(-1) == number).sum((-3, -2)).to(dtype)


def balance_loss(
    probabilities: Float[Tensor, "batch seq e"],
    counts: Float[Tensor, " e"] | Float[Tensor, "batch e"],
    *,
    k: int,
) -> Float[Tensor, ""]:
    """Return experts * sum over experts of (mean probability) * (share of the choices).

    It is 1 if both are even. The counts are constants of any origin: of a microbatch over all data
    axes, or with a leading `batch` of every sequence by itself (then the average over sequences).
    They must be whole: a pending sum in them is an error, as the product of two sums would be the
    wrong number on every mesh but one. The probabilities are summed here, and where tokens are cut
    the result is a pending sum: a term of the loss as it is.

    Args:
        probabilities: of all experts, sum 1 for every token.
        counts: how often each was chosen, by all tokens that `probabilities` has (or more of them,
            counted over several microbatches and divided by their number).
        k: choices of a token.

    Reference: Fedus et al. 2021, arXiv:2101.03961, equation 4; per sequence: DeepSeek-V3,
    arXiv:2412.19437, equation 17.
    """
    batch, seq, num_experts = probabilities.shape
    if counts.dim() == 2:
        total = (probabilities.sum(1) * counts).sum()
        return total * (num_experts / (k * seq**2 * batch))
    total = (probabilities.sum((0, 1)) * counts).sum()
    return total * (num_experts / (k * (batch * seq) ** 2))


def router_z_loss(logits: Float[Tensor, "batch seq e"]) -> Float[Tensor, ""]:
    """Return the mean over tokens of logsumexp(logits)^2: a pending sum where tokens are cut.

    Reference: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.logsumexp(wide, dim=-1).square().sum() * (1 / (logits.shape[0] * logits.shape[1]))


def bias_move(counts: Float[Tensor, "*n e"], *, rate: float = 1e-3) -> Float[Tensor, "*n e"]:
    """Return what a step adds to the bias of `route`: `rate` for experts below the mean load,
    -`rate` above it, 0 at it.

    Args:
        counts: tokens of every expert over the whole step: all microbatches, all data axes.
        rate: how far a bias moves in a step.

    Reference: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    return rate * torch.sign(counts.mean(-1, keepdim=True) - counts)


def updated_bias(
    bias: Float[Tensor, " e"], counts: Float[Tensor, " e"], *, rate: float = 1e-3
) -> Float[Tensor, " e"]:
    """Return the bias of `route` after a step: up for experts below the mean load, else down.

    Args:
        bias: [experts].
        counts, rate: see `bias_move`.
    """
    return bias + bias_move(counts, rate=rate).to(bias.dtype)


def capacity_of(tokens: int, k: int, num_experts: int, factor: float) -> int:
    """Return how many of `tokens` an expert takes: ceil(tokens * k / experts * factor).

    >>> capacity_of(48, 2, 8, 0.75)
    9
    """
    return math.ceil(tokens * k / num_experts * factor)


@op("... t! k!, ... t! k! -> ... t k")
def drop_over_capacity(
    weights: Float[Tensor, "*n t k"],
    experts: Int[Tensor, "*n t k"],
    *,
    num_experts: int,
    capacity: int,
) -> Int[Tensor, "*n t k"]:
    """Let every expert keep its `capacity` heaviest tokens; a choice that is dropped becomes the
    number `num_experts`, which is no expert.

    Equal weights keep the earlier token, so that the result is the same everywhere. Weights are
    left as they are: those of kept choices are not normalised again.

    Args:
        weights, experts: of `route`, over the tokens that share the capacity.
        num_experts: number of experts.
        capacity: tokens that an expert takes, see `capacity_of`.
    """
    flat = experts.flatten(-2)
    first = torch.argsort(-weights.detach().flatten(-2), dim=-1, stable=True)
    second = torch.argsort(flat.gather(-1, first), dim=-1, stable=True)
    order = first.gather(-1, second)  # by expert, the heaviest first
    ordered = flat.gather(-1, order)
    # One more, for choices that were dropped before.
    counts = expert_counts(experts, num_experts=num_experts + 1, dtype=torch.int64)
    starts = torch.cumsum(counts, dim=-1) - counts
    place = torch.arange(flat.shape[-1], device=flat.device) - starts.gather(-1, ordered)
    kept = torch.where(place < capacity, ordered, num_experts)
    return kept.gather(-1, torch.argsort(order, dim=-1)).unflatten(-1, tuple(experts.shape[-2:]))
