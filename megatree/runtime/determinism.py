"""Bit-identical runs: what torch and NCCL need for it, and a refusal of kernels that cannot."""

import os
from collections.abc import Generator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import fx

from megatree.parallel.model import ModelProgram

_WANTED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""Environment variable -> values under which cuBLAS and NCCL add in one order."""

UNORDERED = {"cudnn": "cuDNN's backward adds with atomics"}
"""Attention kernel -> why two runs with it may differ."""


@contextmanager
def deterministic(
    on: bool = True,
    *,
    device: torch.device | str = "cpu",
    environ: MutableMapping[str, str] = os.environ,
) -> Generator[None]:
    """Run what follows so that it gives the same bits every time, or fails.

    torch refuses, by an exception, operators of which it has no deterministic form; cuBLAS and NCCL
    are told by the environment, so enter it before they start. On leaving all is as before.

    Args:
        on: False does nothing.
        device: that the run computes on.
        environ: of the process.

    Raises:
        ValueError: the environment says otherwise already.
    """
    if not on:
        yield
        return
    kept = {name: environ.get(name) for name in _WANTED}
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    try:
        if torch.device(device).type == "cuda":
            _ask(environ)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2:]
        for name, value in kept.items():
            if value is None:
                environ.pop(name, None)
            else:
                environ[name] = value


def _ask(environ: MutableMapping[str, str]) -> None:
    for name, values in _WANTED.items():
        found = environ.setdefault(name, values[0])
        if found not in values:
            raise ValueError(
                f"deterministic: {name} is {found!r} here, under which sums have no fixed "
                f"order. Leave it unset, or set it to {' or '.join(values)}."
            )


def check_kernels(program: ModelProgram, *, compiled: bool = False, device: str = "cpu") -> None:
    """Refuse a model whose kernels may give other bits in another run.

    Args:
        program: the lowered model.
        compiled: whether torch.compile makes kernels of it.
        device: type of the device.

    Raises:
        ValueError: names the line that chose the kernel, and one that can.
    """
    if compiled and device == "cuda":
        raise ValueError(
            "deterministic: torch.compile chooses kernels by timing them, so two runs may use "
            "different ones. Set compile to False, or deterministic to False."
        )
    for part in program.programs():
        for node in part.graph.nodes:
            _check_node(node, UNORDERED)


def _check_node(node: fx.Node, unordered: Mapping[str, str]) -> None:
    kernel = node.kwargs.get("kernel")
    if isinstance(kernel, str) and kernel in unordered:
        raise ValueError(
            f"deterministic: {node.meta.get('source', '?')}: attention kernel {kernel!r}: "
            f"{unordered[kernel]}. Use kernel='flash', 'efficient' or 'reference', or set "
            "deterministic to False."
        )
