"""Start the ranks of a job: in this process, in new ones on this machine, or as a launcher did."""

from collections.abc import Callable
from typing import Any

from megatree.recipes.config import MeshConfig
from megatree.runtime.processes import (
    join_job,
    launch,
    leave_job,
    local_device,
    under_torchrun,
)


def start(
    fn: Callable[..., Any],
    mesh: MeshConfig,
    *args: Any,
    nproc: int = 0,
    timeout_s: float = 600.0,
) -> Any:
    """Run `fn(device, *args)` on every rank of a mesh.

    Under torchrun this process is one of the ranks. Else a mesh of one rank runs in this process,
    and a larger one in as many new processes.

    Args:
        fn: an importable function; its arguments and result must pickle.
        mesh: the ranks.
        args: further arguments.
        nproc: processes to start; 0 for as many as the mesh has ranks.
        timeout_s: seconds that a collective may wait.

    Returns:
        Rank 0's result (under torchrun, this rank's).

    Raises:
        ValueError: there would not be one process per rank.
        RankFailed: a rank raised or died.
    """
    if under_torchrun():
        if nproc:
            raise ValueError(
                f"--nproc: {nproc}, but torchrun has started the processes already. "
                "Leave --nproc out."
            )
        device = join_job(timeout_s=timeout_s)
        try:
            return fn(device, *args)
        finally:
            leave_job()
    if nproc and nproc != mesh.num_ranks:
        raise ValueError(
            f"--nproc: {nproc} processes, but the mesh ({mesh}) has {mesh.num_ranks} ranks. "
            f"Leave --nproc out, or set {_fitting(mesh, nproc)}."
        )
    if mesh.num_ranks == 1:
        return fn(local_device(0), *args)
    return launch(fn, mesh.num_ranks, *args, timeout_s=timeout_s)


def _fitting(mesh: MeshConfig, nproc: int) -> str:
    """Name the smallest change of a mesh to so many ranks."""
    if nproc % mesh.tp == 0:
        return f"mesh.dp to {nproc // mesh.tp}"
    if nproc % mesh.dp == 0:
        return f"mesh.tp to {nproc // mesh.dp}"
    return f"mesh.dp to 1 and mesh.tp to {nproc}"
