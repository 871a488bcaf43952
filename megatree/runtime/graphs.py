"""Gradients of a step as a CUDA graph: one launch instead of thousands, where launches bound."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatree.parallel.comm import RankComm
from megatree.parallel.layout import Layout
from megatree.runtime.gradients import Gradients, check_weights

WARM_UP = 2
"""Calls before the capture: the first compiles and tunes, the second allocates as all others do."""

Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
"""What `Gradients` returns."""


class _Captured(NamedTuple):
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    batches: list[dict[str, Tensor]]
    scale: Tensor
    found: Found


class GraphedGradients:
    """`Gradients` of one GPU, recorded at the third step and replayed from then on.

    Law: a replay runs the kernels of the recorded step on this step's batch, scale and parameters.

    Every number of microbatches is recorded apart; all graphs share their memory, which stays
    theirs. Everything happens on one stream, which is not the default one: autograd adds a leaf's
    gradient on the stream where the leaf was first used, and a graph records no stream but its own.

    Args:
        make: allocates the gradients.
        device: a GPU.
    """

    def __init__(self, make: Callable[[], Gradients], device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        main = torch.cuda.current_stream(device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            self.gradients = make()
        main.wait_stream(self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._calls: dict[int, int] = {}
        self._captured: dict[int, _Captured] = {}

    def __call__(
        self, microbatches: Sequence[Mapping[str, Tensor]], *, scale: float = 1.0, look: bool = True
    ) -> Found:
        """Do what `Gradients` does, see there.

        Raises:
            ValueError: a term has no weight in the whole step.
            RuntimeError: the step does what a graph cannot hold, such as wait for the device.
        """
        num = len(microbatches)
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            if num not in self._captured and self._calls.get(num, 0) < WARM_UP:
                self._calls[num] = self._calls.get(num, 0) + 1
                found = self.gradients(microbatches, scale=scale, look=False)
            else:
                found = self._replayed(microbatches, scale)
        main.wait_stream(self._stream)
        if look:
            check_weights([(name, weight.item()) for name, weight in found[1].items()], num)
        return found

    def _replayed(self, microbatches: Sequence[Mapping[str, Tensor]], scale: float) -> Found:
        num = len(microbatches)
        if num not in self._captured:
            self._captured[num] = self._capture(microbatches)
        graph, batches, factor, found = self._captured[num]
        for target, source in zip(batches, microbatches, strict=True):
            for name, x in source.items():
                target[name].copy_(x)
        factor.fill_(scale)
        graph.replay()
        # The next replay writes where this one did, and reports are read later.
        terms, weights, outs = ({name: x.clone() for name, x in part.items()} for part in found)
        return terms, weights, outs

    def _capture(self, microbatches: Sequence[Mapping[str, Tensor]]) -> _Captured:
        self.gradients.weights.settle()  # what a checkpoint still copies waits outside the graph
        batches = [{name: x.clone() for name, x in batch.items()} for batch in microbatches]
        scale = torch.ones((), dtype=torch.float64, device=self.gradients.bound.comm.device)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the first steps took, which the graph allocates anew
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                found = self.gradients(batches, scale=scale, look=False)
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graphs: a step of {len(batches)} microbatches cannot be recorded: it waits "
                "for the device or does something else that no graph holds (the error above says "
                "where). Set cuda_graphs to False."
            ) from error
        return _Captured(graph, batches, scale, found)


def check_graphs(layout: Layout, comm: RankComm) -> None:
    """Refuse graphs where a step cannot be one.

    Raises:
        ValueError: there is no GPU, more than one rank, or offload.
    """
    if comm.device.type != "cuda":
        raise ValueError(
            f"cuda_graphs: a step on {comm.device.type} launches no kernels of a GPU. "
            "Set cuda_graphs to False."
        )
    if layout.mesh.num_ranks > 1:
        raise ValueError(
            f"cuda_graphs: {layout.mesh} has {layout.mesh.num_ranks} ranks, and only a step of "
            "one rank is recorded. Set cuda_graphs to False."
        )
    if layout.remat.offload:
        raise ValueError(
            "cuda_graphs: activations that are offloaded to the host are copied beside the step, "
            "which no graph holds. Set cuda_graphs or remat.offload to False."
        )
