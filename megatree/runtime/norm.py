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
        norm = _norm(grads[group.name])
        copies = group.copies // group.num_parts("opt") * max(1, len(group.holders))
        total = total + norm * norm / copies
    axes = tuple(comm.sizes)
    return (comm.psum(total, axes) if axes else total).sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what to multiply gradients with so that their norm is at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


_PART = 4096
"""Elements whose squares are added in float32."""


def _norm(x: Tensor) -> Tensor:
    """Return the L2 norm of a buffer in float64, the same to 1e-6 however it is cut.

    A CPU adds one after another: over 1e7 elements in float32 it loses 4e-4. A GPU adds in a tree.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dtype=wide).double()
    whole = x.shape[-1] // _PART * _PART
    parts = [x[..., :whole].unflatten(-1, (-1, _PART)), x[..., whole:]]
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=wide) for part in parts]
    return torch.cat([norm.double().flatten() for norm in norms]).norm()
