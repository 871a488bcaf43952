"""The training step: gradients over microbatches, typed norm and clipping, update."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from megatree.functional import keys
from megatree.functional.chain import Chain
from megatree.functional.param import initial_value, logical_shape
from megatree.functional.tree import flatten_with_names
from megatree.parallel.comm import RankComm
from megatree.parallel.layout import PIPELINE, Layout, spec_box
from megatree.parallel.loss_scale import LossScaleState
from megatree.parallel.model import ModelProgram, lower_model
from megatree.parallel.order import to_order
from megatree.parallel.packing import Group, pack
from megatree.parallel.precision import Precision
from megatree.parallel.siblings import side_by_side
from megatree.runtime.forward import BoundModel, one_device
from megatree.runtime.gradients import Gradients, make_gradients
from megatree.runtime.graphs import GraphedGradients, check_graphs
from megatree.runtime.norm import clip_factor, global_norm
from megatree.runtime.optimizers import (
    GroupRule,
    LeafRule,
    Matrix,
    Optimizer,
    clip_value,
    decay_matrices,
)
from megatree.runtime.rounding import stochastic_round
from megatree.runtime.weights import Weights


@dataclass
class TrainState:
    """What a step reads and writes, as this rank's buffers.

    Args:
        step: number of steps made, those that made no update included.
        weights: the parameters.
        opt: the optimizer's state, name -> group name -> this rank's part of the buffer.
        master: group name -> float32 copy of this rank's part, for parameters in a narrow dtype.
        skipped: number of steps that made no update, as gradients were not finite.
        scale: the loss scale, where there is one.
        halted: 1 once a step that nobody has looked at yet was not finite (see `TrainStep`), so
            that no later one makes an update.
    """

    step: int
    weights: Weights
    opt: dict[str, dict[str, Tensor]]
    master: dict[str, Tensor]
    skipped: int = 0
    scale: LossScaleState | None = None
    halted: Tensor | None = None

    @property
    def params(self) -> dict[str, Tensor]:
        """Group name -> buffer of parameters as they are stored."""
        self.weights.settle()
        return self.weights.stored

    @property
    def updates(self) -> int:
        """The number of updates made."""
        return self.step - self.skipped

    def counters(self) -> dict[str, Any]:
        """Return the small values that a checkpoint keeps beside the arrays."""
        out: dict[str, Any] = {"step": self.step}
        if self.skipped:
            out["skipped"] = self.skipped
        if self.scale is not None:
            out["loss_scale"] = self.scale.to_json()
        return out

    def restore(self, extra: dict[str, Any]) -> None:
        """Take the small values out of what a checkpoint kept."""
        self.step = int(extra.pop("step"))
        self.skipped = int(extra.pop("skipped", 0))
        scale = extra.pop("loss_scale", None)
        if scale is not None and self.scale is not None:
            self.scale = LossScaleState.from_json(scale)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a step reports, the same on all ranks.

    Args:
        terms: loss term -> value; the objective is their sum.
        weights: loss term -> its weight (for a language model, tokens that count).
        grad_norm: L2 norm of all gradients before clipping.
        outs: what else the segments return, of all stages: "segment.name" -> [microbatches, ...],
            and of a stack "stack.kind.name" -> [microbatches, layers, ...].
        skipped: whether no update was made, as gradients were not finite or the loss was above
            what the caller allowed; without a loss scale
            and `Precision.skip_nonfinite` nobody looks: the norm tells.
        loss_scale: what the loss was multiplied by.
    """

    terms: dict[str, Tensor]
    weights: dict[str, Tensor]
    grad_norm: Tensor
    outs: dict[str, Tensor] = field(default_factory=dict)
    skipped: bool = False
    loss_scale: float = 1.0

    @property
    def loss(self) -> Tensor:
        """The objective: the sum of the terms."""
        return _objective(self.terms)


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
    max_value: float | None = None
    graphed: GraphedGradients | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The plan of the buffers."""
        return self.gradients.groups

    @cached_property
    def rules(self) -> dict[str, GroupRule]:
        """Group name -> what the optimizer is told about it."""
        return {
            group.name: group_rule(group, self.program, self.comm)
            for group in self.groups
            if group.trained
        }

    @property
    def comm(self) -> RankComm:
        """This rank's collectives."""
        return self.gradients.bound.comm

    def init(self, seed: int | None = None) -> TrainState:
        """Allocate parameters and optimizer state; values depend on the seed alone, not the
        mesh.
        """
        program, comm, weights = self.program, self.comm, self.gradients.weights
        model = program.model
        names, leaves, _ = flatten_with_names(model.params)
        declared = dict(zip(names, leaves, strict=True))
        shards = weights.shards()
        master = self._masters(shards)
        with torch.no_grad():
            for group in self.groups:
                target = master.get(group.name, shards[group.name])
                for leaf, layer, view in group.pieces(target):
                    ty, param = program.types[leaf.path], declared[leaf.path]
                    box = group.piece_box(ty, leaf, comm.sizes, comm.coords)
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
            for name, buffer in master.items():
                shards[name].copy_(buffer)
        weights.publish(shards)
        return self._state(shards, master)

    def blank(self, shards: Mapping[str, Tensor]) -> TrainState:
        """Allocate a state for parameters whose values are still to come into `shards`."""
        return self._state(shards, self._masters(shards))

    def fresh(self, master: dict[str, Tensor] | None = None) -> TrainState:
        """Return the first state of a run that begins with the parameters as they are.

        Args:
            master: float32 copies that know more than they do, as `blank` gave them; None for
                copies of the parameters.
        """
        shards = self.gradients.weights.shards()
        if master is None:
            master = {name: shards[name].to(x.dtype) for name, x in self._masters(shards).items()}
        return self._state(shards, master)

    def _masters(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        precision = self.gradients.precision
        return _float32_like(shards, precision) if precision.master else {}

    def _state(self, shards: Mapping[str, Tensor], master: dict[str, Tensor]) -> TrainState:
        opt = self.optimizer.init(self._trained({**shards, **master}), self.rules)
        scaling = self.gradients.precision.loss_scale
        scale = None if scaling is None else scaling.start()
        return TrainState(0, self.gradients.weights, opt, master, scale=scale)

    def params(self, state: TrainState) -> Any:
        """Return the tree of local parameters: views of the buffers, or copies where storage cuts
        them.
        """
        return state.weights.tree(self.program.model.params)

    def batch_boxes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Return entry name -> this rank's box of a microbatch."""
        program, comm = self.program, self.comm
        types = program.consts.types
        return {
            name: spec_box(
                types[f"batch.{name}"].spec, types[f"batch.{name}"].shape, comm.sizes, comm.coords
            )
            for name in program.model.batch
        }

    def local(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cut this rank's part out of a whole microbatch (tensors or numpy arrays)."""
        device = self.comm.device
        boxes, types = self.batch_boxes(), self.program.consts.types
        chunks = self.program.layout.num_chunks

        def piece(name: str, x: Any) -> Tensor:
            whole = to_order(torch.as_tensor(x), types[f"batch.{name}"].permuted, chunks)
            return whole[tuple(slice(a, b) for a, b in boxes[name])].to(device)

        return {name: piece(name, x) for name, x in batch.items()}

    def with_keys(
        self, microbatches: Sequence[Mapping[str, Tensor]], step: int
    ) -> list[dict[str, Tensor]]:
        """Add the key of (seed, step, microbatch) where the model draws random numbers."""
        if "key" not in self.program.model.batch:
            return [dict(batch) for batch in microbatches]
        device = self.comm.device
        return [
            {**batch, "key": _scalar(int(keys.fold(self.seed, step, i)), torch.int64, device)}
            for i, batch in enumerate(microbatches)
        ]

    @property
    def waits(self) -> bool:
        """Whether every step reads from the device whether its gradients are finite."""
        precision = self.gradients.precision
        return precision.skip_nonfinite or precision.loss_scale is not None

    def __call__(
        self,
        state: TrainState,
        microbatches: Sequence[Mapping[str, Tensor]],
        *,
        ahead: bool = False,
        most: float | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Make one update.

        Args:
            state: as `init` or a checkpoint gave it; its buffers are changed in place.
            microbatches: local batches, each this rank's part of the same global microbatch.
            ahead: read nothing from the device (but see `waits`): the caller looks at the metrics
                later. Until then a step whose loss or norm is not finite makes no update, and
                neither does any after it, so that what is wrong can still be found.
            most: make no update where the loss is above this; the host waits for the loss.

        Returns:
            The state after the update, and what to report.

        Raises:
            ValueError: a loss term has no weight in the whole step; ahead, nobody has looked.
        """
        precision = self.gradients.precision
        loss_scale = 1.0 if state.scale is None else state.scale.scale
        compute = self.gradients if self.graphed is None else self.graphed
        terms, weights, outs = compute(
            self.with_keys(microbatches, state.step), scale=loss_scale, look=not ahead
        )
        grads = self._main(self.gradients.sums.shards())
        norm = global_norm(self.groups, grads, self.comm) / loss_scale
        finite = norm.isfinite()
        factor = 1.0 if self.max_norm is None else clip_factor(norm, self.max_norm)
        overflow = self.waits and not finite.item()
        skips = overflow or (most is not None and _objective(terms).item() > most)
        bad = (~finite).float()
        if state.halted is not None:
            bad = torch.maximum(bad, state.halted)
        if not skips:
            if self.max_value is not None:
                clip_value(grads, self.max_value * loss_scale)
            scale = factor / loss_scale
            if not isinstance(scale, Tensor):
                scale = _scalar(scale, torch.float32, self.comm.device)
            self._update(state, grads, scale.float(), None if self.waits else bad, outs)
        after = replace(state, step=state.step + 1, skipped=state.skipped + skips)
        if precision.loss_scale is not None and state.scale is not None:
            after.scale = precision.loss_scale.after(state.scale, overflow=overflow)
        metrics = Metrics(
            terms=terms,
            weights=weights,
            grad_norm=norm,
            outs=outs,
            skipped=skips,
            loss_scale=loss_scale,
        )
        after.halted = None
        if ahead and not self.waits:
            after.halted = torch.maximum(bad, (~metrics.loss.isfinite()).float())
        return after, metrics

    @torch.no_grad()
    def _main(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy narrow gradients to their float32 buffers, where the precision asks for them."""
        for name, buffer in self.main_grads.items():
            buffer.copy_(grads[name])
        return {**grads, **self.main_grads}

    @cached_property
    def main_grads(self) -> dict[str, Tensor]:
        """Group name -> float32 copy of this rank's part of narrow gradients."""
        precision = self.gradients.precision
        if not precision.main_grads:
            return {}
        return _float32_like(self.gradients.sums.shards(), precision)

    @torch.no_grad()
    def _update(
        self,
        state: TrainState,
        grads: Mapping[str, Tensor],
        scale: Tensor,
        found_inf: Tensor | None,
        outs: Mapping[str, Tensor],
    ) -> None:
        """Update masters and parameters; gathers of what is stored cut run on."""
        shards = state.weights.shards()
        targets = {**shards, **state.master}
        rounds = self.gradients.precision.rounding == "stochastic"
        if rounds:
            wide = {n: x.float() for n, x in targets.items() if x.dtype.itemsize < 4}
            targets = {**targets, **wide}
        copies = {} if rounds else self._trained({n: shards[n] for n in state.master})
        self.optimizer.update(
            self._trained(targets),
            self._trained(grads),
            state.opt,
            step=state.updates,
            groups=self.rules,
            scale=scale,
            found_inf=found_inf,
            copies=copies,
        )
        self._move(targets, outs, found_inf)
        for group in self.groups:
            source, target = targets[group.name], shards[group.name]
            if source is target or group.name in copies:
                continue
            if rounds and source.dtype != target.dtype:
                self._round(group, source, target, state.step)
            else:
                target.copy_(source)
        state.weights.publish(shards)

    def _trained(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the groups that have no gradients."""
        return {g.name: buffers[g.name] for g in self.groups if g.trained and g.name in buffers}

    def _move(
        self, targets: Mapping[str, Tensor], outs: Mapping[str, Tensor], found_inf: Tensor | None
    ) -> None:
        """Move what is not trained by the metrics of the step, which all ranks share."""
        model = self.program.model
        for group in self.groups:
            if group.trained:
                continue
            prefix = f"{group.unit}."
            metrics = {k.removeprefix(prefix): x for k, x in outs.items() if k.startswith(prefix)}
            for leaf, layer, view in group.pieces(targets[group.name]):
                if (move := model.moves.get(leaf.path)) is None:
                    continue
                here = metrics if layer is None else {k: x[:, layer] for k, x in metrics.items()}
                box = group.piece_box(
                    self.program.types[leaf.path], leaf, self.comm.sizes, self.comm.coords
                )
                change = move(here, model.cfg)[tuple(slice(*edge) for edge in box)].to(view.dtype)
                if found_inf is not None:
                    change = change.masked_fill(found_inf > 0, 0.0)
                view.add_(change)

    def _round(self, group: Group, source: Tensor, target: Tensor, step: int) -> None:
        """Round updated parameters by (seed, step, path, layer, global element index)."""
        pairs = zip(group.pieces(source), group.pieces(target), strict=True)
        for (leaf, layer, value), (_, _, out) in pairs:
            ty = self.program.types[leaf.path]
            box = group.piece_box(ty, leaf, self.comm.sizes, self.comm.coords)
            key = keys.fold(self.seed, "round", step, leaf.path, layer or 0)
            out.copy_(stochastic_round(value, target.dtype, key, shape=ty.shape, box=box))

    def evaluate(self, microbatches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the value of every loss term over microbatches, without gradients or dropout."""
        return self.forward(microbatches)[0]

    def forward(
        self, microbatches: Sequence[Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what `evaluate` does, and the metrics of all stages (`Metrics.outs`)."""
        return self.gradients.values(microbatches, self.evaluation)


def _objective(terms: Mapping[str, Tensor]) -> Tensor:
    """Add the terms of a loss."""
    return torch.stack(list(terms.values())).sum()


def _float32_like(parts: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Allocate zeroed float32 buffers for the parts that are narrower."""
    return {
        name: torch.zeros_like(part, dtype=torch.float32, memory_format=torch.contiguous_format)
        for name, part in parts.items()
        if precision.is_narrow(part.dtype)
    }


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Filled where it is needed: `torch.tensor` makes it on the host, and its copy would wait.
    return torch.full((), value, dtype=dtype, device=device)


def train_step(
    model: Chain,
    layout: Layout,
    optimizer: Optimizer,
    *,
    comm: RankComm | None = None,
    max_norm: float | None = 1.0,
    max_value: float | None = None,
    seed: int = 0,
    rules: Callable[[str, int], LeafRule] = decay_matrices,
    precision: Precision = Precision(),  # noqa: B008 (frozen)
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn,
    graphs: bool = False,
    program: ModelProgram | None = None,
) -> TrainStep:
    """Lower a model and bind its training step to this rank.

    Args:
        model: a chain; its sizes are those of one microbatch over all ranks.
        layout: mesh and rules.
        optimizer: (init, update), see `adamw`.
        comm: this rank's collectives; None for a layout of one rank.
        max_norm: clip the global norm of the gradients to this; None leaves them.
        max_value: clip every element of the gradients to this, after the norm is taken.
        seed: of parameters and dropout.
        rules: (path, number of dims) -> the leaf's multipliers, see `by_path`.
        precision: what is stored in which dtype.
        transform: applied to every bound program (torch.compile, say).
        graphs: record forward and backward as a CUDA graph (see `GraphedGradients`).
        program: the model as lowered for the layout, if the caller has it.

    Returns:
        The step.

    Raises:
        ShardingError: the model cannot be typed under this layout.
        ValueError: a graph cannot hold a step of this layout.
    """
    program = program or lower_model(model, layout)
    comm = comm or one_device(layout)
    groups = pack(program, rule=rules, stage_rank=comm.coords.get(PIPELINE, 0))
    make = partial(
        make_gradients, program, comm, groups=groups, precision=precision, transform=transform
    )
    graphed = None
    if graphs:
        check_graphs(layout, comm)
        graphed = GraphedGradients(make, comm.device)
    gradients = make() if graphed is None else graphed.gradients
    evaluation = gradients.bound
    if (form := model.for_evaluation()) is not model:
        evaluation = BoundModel(
            lower_model(form, layout),
            comm,
            transform=transform,
            siblings=side_by_side(program, groups),
        )
    return TrainStep(program, gradients, evaluation, optimizer, max_norm, seed, max_value, graphed)


def group_rule(group: Group, program: ModelProgram, comm: RankComm) -> GroupRule:
    """Return what an optimizer is told about a group; its matrices come with their collectives."""
    rule = group.rule
    assert isinstance(rule, LeafRule)
    if not rule.matrix:
        return GroupRule(lr=rule.lr, decay=rule.decay)
    most = group.num_parts("opt")
    matrices = []
    for leaf in group.leaves:
        spec = group.piece_spec(program.types[leaf.path], leaf)
        matrices.append(
            Matrix(
                start=leaf.start // most,
                shape=leaf.piece(most),
                gather=partial(_gather, comm, spec),
                cut=partial(_cut, comm, spec),
                columns_are_inputs=rule.columns_are_inputs,
            )
        )
    return GroupRule(lr=rule.lr, decay=rule.decay, matrices=tuple(matrices))


def _gather(comm: RankComm, spec: tuple[tuple[str, ...], ...], x: Tensor) -> Tensor:
    for dim, axes in enumerate(spec, 1):
        if axes:
            x = comm.all_gather(x.contiguous(), axes, dim)
    return x


def _cut(comm: RankComm, spec: tuple[tuple[str, ...], ...], x: Tensor) -> Tensor:
    for dim, axes in enumerate(spec, 1):
        if axes:
            x = x.chunk(comm.size(axes), dim)[comm.index(axes)]
    return x
