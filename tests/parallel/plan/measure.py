"""What a training step holds, measured: the storages of its buffers and those autograd saves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatree.functional.chain import Chain
from megatree.models.gpt import GPTConfig
from megatree.parallel.layout import Layout
from megatree.parallel.threads import Threads
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that one rank holds.

    Args:
        parameters, gradients, optimizer: storages of the buffers.
        saved: storages that `saved_tensors_hooks` sees in a step and that are none of these.
    """

    parameters: int
    gradients: int
    optimizer: int
    saved: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.saved


def batch(cfg: GPTConfig, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(
        0, cfg.vocab_size, (2, size, cfg.seq_length), generator=generator
    )
    return {"tokens": tokens, "labels": labels, "weights": torch.ones(size, cfg.seq_length)}


def held(model: Chain, layout: Layout, values: dict[str, Tensor]) -> Held:
    """Make a step on every rank, as threads; return what rank 0 held."""

    def rank_main(comm: Any) -> Held:
        step = train_step(model, layout, adamw(1e-3), comm=comm)
        state = step.init(0)
        buffers = {
            "parameters": list(state.params.values()),
            "gradients": list(step.gradients.sums.stored.values()),
            "optimizer": [
                x for table in (*state.opt.values(), state.master) for x in table.values()
            ],
        }
        storages = {
            name: {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in xs}
            for name, xs in buffers.items()
        }
        own = {key for table in storages.values() for key in table}
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            step(state, [step.local(values)])
        sizes = {name: sum(table.values()) for name, table in storages.items()}
        return Held(**sizes, saved=sum(saved.values()))

    sizes = layout.mesh.sizes
    return Threads(sizes).run(rank_main)[0] if sizes else rank_main(None)
