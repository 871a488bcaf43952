"""The training step: gradients over microbatches, typed norm and clipping, update."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatree.functional import keys
from megatree.functional.chain import Chain
from megatree.functional.param import initial_value, logical_shape
from megatree.functional.tree import flatten_with_names
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import PIPELINE, Layout, spec_box
from megatree.parallel.model import ModelProgram, lower_model
from megatree.runtime.adamw import Optimizer
from megatree.runtime.forward import BoundModel, one_device
from megatree.runtime.gradients import Gradients, make_gradients
from megatree.runtime.norm import clip_factor, global_norm
from megatree.runtime.packing import Group, decays_matrices, pack, views


@dataclass
class TrainState:
    """What a step reads and writes, as this rank's buffers.

    Args:
        step: number of updates made.
        params: group name -> buffer.
        opt: the optimizer's state over the same buffers.
    """

    step: int
    params: dict[str, Tensor]
    opt: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a step reports, the same on all ranks.

    Args:
        terms: loss term -> value; the objective is their sum.
        weights: loss term -> its weight (for a language model, tokens that count).
        grad_norm: L2 norm of all gradients before clipping.
    """

    terms: dict[str, Tensor]
    weights: dict[str, Tensor]
    grad_norm: Tensor

    @property
    def loss(self) -> Tensor:
        """The objective: the sum of the terms."""
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class TrainStep:
    """A step bound to one rank: `state, metrics = step(state, microbatches)`.

    The buffers of `state` are updated in place.
    """

    program: ModelProgram
    gradients: Gradients
    evaluation: BoundModel
    optimizer: Optimizer
    max_norm: float | None
    seed: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """The plan of the buffers."""
        return self.gradients.groups

    def init(self, seed: int | None = None) -> TrainState:
        """Allocate parameters and optimizer state; values depend on the seed alone, not the
        mesh.
        """
        program, comm = self.program, self.gradients.bound.comm
        model = program.model
        names, leaves, _ = flatten_with_names(model.params)
        declared = dict(zip(names, leaves, strict=True))
        params = self.gradients.params
        with torch.no_grad():
            for group in self.groups:
                for leaf, layer, view in group.rows(params[group.name]):
                    ty, param = program.types[leaf.path], declared[leaf.path]
                    box = spec_box(ty.spec, ty.shape, comm.sizes, comm.coords)
                    value = initial_value(
                        param,
                        leaf.path,
                        logical_shape(param, model.sizes, leaf.path),
                        box if layer is None else ((layer, layer + 1), *box),
                        self.seed if seed is None else seed,
                        group.dtype,
                        comm.device,
                    )
                    view.copy_(value if layer is None else value[0])
        return TrainState(step=0, params=params, opt=self.optimizer.init(params))

    def params(self, state: TrainState) -> Any:
        """Return the tree of local parameters, as views."""
        return views(self.groups, state.params, self.program.model.params)

    def batch_boxes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Return entry name -> this rank's box of a microbatch."""
        program, comm = self.program, self.gradients.bound.comm
        types = program.consts.types
        return {
            name: spec_box(
                types[f"batch.{name}"].spec, types[f"batch.{name}"].shape, comm.sizes, comm.coords
            )
            for name in program.model.batch
        }

    def local(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cut this rank's part out of a whole microbatch (tensors or numpy arrays)."""
        device = self.gradients.bound.comm.device
        boxes = self.batch_boxes()
        return {
            name: torch.as_tensor(x)[tuple(slice(a, b) for a, b in boxes[name])].to(device)
            for name, x in batch.items()
        }

    def with_keys(
        self, microbatches: Sequence[Mapping[str, Tensor]], step: int
    ) -> list[dict[str, Tensor]]:
        """Add the key of (seed, step, microbatch) where the model draws random numbers."""
        if "key" not in self.program.model.batch:
            return [dict(batch) for batch in microbatches]
        device = self.gradients.bound.comm.device
        return [
            {**batch, "key": torch.tensor(keys.fold(self.seed, step, i), device=device)}
            for i, batch in enumerate(microbatches)
        ]

    def __call__(
        self, state: TrainState, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[TrainState, Metrics]:
        """Make one update.

        Args:
            state: as `init` or a checkpoint gave it; its buffers are changed in place.
            microbatches: local batches, each this rank's part of the same global microbatch.

        Returns:
            The state after the update, and what to report.

        Raises:
            ValueError: a loss term has no weight in the whole step.
        """
        terms, weights = self.gradients(self.with_keys(microbatches, state.step))
        grads, comm = self.gradients.grads, self.gradients.bound.comm
        norm = global_norm(self.groups, grads, comm)
        scale = 1.0 if self.max_norm is None else clip_factor(norm, self.max_norm).float()
        decay = {group.name: group.decay for group in self.groups}
        self.optimizer.update(
            state.params, grads, state.opt, step=state.step, decay=decay, scale=scale
        )
        metrics = Metrics(terms=terms, weights=weights, grad_norm=norm)
        return TrainState(state.step + 1, state.params, state.opt), metrics

    def evaluate(self, microbatches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the value of every loss term over microbatches, without gradients or dropout."""
        return self.gradients.values(microbatches, self.evaluation)


def train_step(
    model: Chain,
    layout: Layout,
    optimizer: Optimizer,
    *,
    comm: RankComm | None = None,
    max_norm: float | None = 1.0,
    seed: int = 0,
    decays: Callable[[str, int], bool] = decays_matrices,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
) -> TrainStep:
    """Lower a model and bind its training step to this rank.

    Args:
        model: a chain; its sizes are those of one microbatch over all ranks.
        layout: mesh and rules.
        optimizer: (init, update), see `adamw`.
        comm: this rank's collectives; None for a layout of one rank.
        max_norm: clip the global norm of the gradients to this; None leaves them.
        seed: of parameters and dropout.
        decays: (path, number of dims) -> whether weight decay applies.
        transform: applied to every bound program (torch.compile, say).

    Returns:
        The step.

    Raises:
        ShardingError: the model cannot be typed under this layout.
    """
    program = lower_model(model, layout)
    comm = comm or one_device(layout)
    groups = pack(program, decays=decays, stage_rank=comm.coords.get(PIPELINE, 0))
    gradients = make_gradients(program, comm, groups=groups, transform=transform)
    evaluation = gradients.bound
    if (form := model.for_evaluation()) is not model:
        evaluation = BoundModel(
            lower_model(form, layout), gradients.bound.comm, transform=transform
        )
    return TrainStep(program, gradients, evaluation, optimizer, max_norm, seed)
