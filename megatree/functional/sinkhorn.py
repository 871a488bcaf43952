"""Sinkhorn's iteration: scores of tokens for experts that no expert is preferred by."""

import torch
from jaxtyping import Float
from torch import Tensor

from megatree.functional.comm import Comm
from megatree.functional.local_map import Out, local_map

_TINY = 1e-8
"""Added to sums that divide."""


def sinkhorn(
    logits: Float[Tensor, "batch seq_moe e"], *, tolerance: float = 1e-4, most: int = 1000
) -> Float[Tensor, "batch seq_moe e"]:
    """Return exp(logits), rows and columns scaled in turn until all experts have equal sums.

    With T tokens and E experts, d0 (per token) = 1/T / (sum of d1 * exp over experts) and d1 (per
    expert) = 1/E / (sum of d0 * exp over all tokens of all ranks), until the mean change of d1 is
    below `tolerance`: the same decision on all ranks, as the sums are the same. The best k of a
    row are a choice that is nearly even; the result carries no gradient. The host looks at the
    change once an iteration.

    Args:
        logits: laid out as "batch seq_moe _".
        tolerance: see above.
        most: iterations at most.

    Reference: Clark et al. 2022, arXiv:2202.01169, section 3.2 and appendix B.
    """
    place = "batch seq_moe _"

    def balanced(comm: Comm, logits: Tensor) -> Tensor:
        return _iterate(comm, logits.detach(), tolerance, most)

    body = local_map(balanced, in_axes=(place,), out_axes=Out(place, grad=False), any_order=True)
    return body(logits)


def _iterate(comm: Comm, logits: Tensor, tolerance: float, most: int) -> Tensor:
    cost = torch.exp(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    batch, seq, num_experts = cost.shape
    tokens = batch * seq * comm.axis_size("batch") * comm.axis_size("seq_moe")
    d0 = cost.new_ones(batch, seq)
    d1 = cost.new_ones(num_experts)
    for _ in range(most):
        before = d1
        d0 = 1 / tokens / ((d1 * cost).sum(-1) + _TINY)
        total = (d0.unsqueeze(-1) * cost).sum((0, 1))
        total = comm.psum(comm.psum(total, "batch"), "seq_moe")
        d1 = 1 / num_experts / (total + _TINY)
        if comm.plans or (d1 - before).abs().mean().item() < tolerance:
            break
    return d1 * cost * d0.unsqueeze(-1)
