"""The global norm of gradients, from types: every element counts once on any mesh."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatree.parallel.comm import RankComm
from megatree.parallel.packing import Group


def global_norm(groups: tuple[Group, ...], grads: Mapping[str, Tensor], comm: RankComm) -> Tensor:
    """Return the L2 norm of all gradients as a float64 scalar that all ranks share.

    The local sum of squares of a group is divided by the number of ranks that store the same
    elements (and of stages that hold a copy); one scalar is summed over the whole mesh.

    Args:
        groups: the plan of the buffers.
        grads: group name -> this rank's part at the finest level, synchronised.
        comm: this rank's collectives.
    """
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    for group in groups:
        norm = torch.linalg.vector_norm(grads[group.name], dtype=_wide(grads[group.name])).double()
        copies = group.copies // group.num_parts("opt") * max(1, len(group.holders))
        total = total + norm * norm / copies
    axes = tuple(comm.sizes)
    return (comm.psum(total, axes) if axes else total).sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what to multiply gradients with so that their norm is at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
