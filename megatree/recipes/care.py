"""What a config says of looking after a run, as the values that do it."""

import signal
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch

from megatree.io.world import World
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import ModelProgram
from megatree.recipes.config import RunConfig
from megatree.runtime.determinism import check_kernels, deterministic
from megatree.runtime.health import Health
from megatree.runtime.processes import GroupBoard, under_torchrun
from megatree.runtime.product_precision import product_precision
from megatree.runtime.recorded import Recorder
from megatree.runtime.signals import StopRequest
from megatree.runtime.train import Care
from megatree.runtime.watchdog import Watchdog, end_process

_LONGER = 1.25
"""A process group waits this much longer than a watchdog, which says more."""


def health_of(cfg: RunConfig) -> Health:
    """Return what is looked at after every step."""
    said = cfg.health
    return Health(
        nonfinite=said.nonfinite,
        max_skips=said.max_skips,
        spike_factor=said.spike_factor,
        spike_window=said.spike_window,
        spike=said.spike,
        delay=said.delay,
        invariant_every=said.invariant_every,
    )


def group_timeout(cfg: RunConfig) -> float:
    """Return how many seconds the process group itself lets a collective wait."""
    return max(600.0, _LONGER * cfg.health.hang_s)


@contextmanager
def caring(
    cfg: RunConfig, mesh: Mesh, world: World, recorder: Recorder, device: torch.device
) -> Generator[Care]:
    """Look after a run while it goes on: its bits and products, its signals, its ranks.

    Args:
        cfg: the run.
        mesh: its ranks.
        world: its processes.
        recorder: notes this rank's calls.
        device: of this rank.
    """
    with ExitStack() as stack:
        stack.enter_context(deterministic(cfg.deterministic, device=device))
        said = cfg.precision
        stack.enter_context(product_precision(said.matmul, narrow_sums=said.narrow_sums))
        if cfg.health.hang_s and world.size == mesh.num_ranks > 1:
            stack.enter_context(_watchdog(cfg, mesh, world, recorder))
        numbers = [signal.Signals[name] for name in cfg.health.stop_on]
        stop = stack.enter_context(StopRequest(numbers)) if numbers else None
        yield Care(
            health=health_of(cfg),
            stop=stop,
            recorder=recorder if world.size > 1 else None,
            peak_flops=cfg.log.peak_flops or None,
        )


def _watchdog(cfg: RunConfig, mesh: Mesh, world: World, recorder: Recorder) -> Watchdog:
    def end(text: str, tells: bool) -> None:
        # Where we launched the processes, the one that did tells what it finds on the board.
        end_process(text, tells and under_torchrun())

    return Watchdog(
        recorder,
        GroupBoard(),
        rank=world.rank,
        coords=[mesh.coords(rank) for rank in range(mesh.num_ranks)],
        timeout_s=cfg.health.hang_s,
        end=end,
    )


def check_deterministic(cfg: RunConfig, program: ModelProgram, device: torch.device) -> None:
    """Refuse kernels that may give other bits in another run, where the config forbids them.

    Raises:
        ValueError: names the kernel and its line.
    """
    if cfg.deterministic:
        check_kernels(program, compiled=cfg.compile, device=device.type)
