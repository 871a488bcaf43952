"""Run a schedule on one rank: forwards, backwards and messages in one global order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatree.parallel.layout import PIPELINE
from megatree.parallel.model import ModelProgram
from megatree.parallel.schedule import Action, Recv, Schedule, Send, rank_programs
from megatree.parallel.split import weight_gradient
from megatree.parallel.types import ShardType
from megatree.runtime.forward import BoundModel, Deferred, TermKey
from megatree.runtime.leaves import Leaves

Message = tuple[str, int, int]


@dataclass
class _Live:
    """What a stage keeps of a microbatch between its forward and its backward."""

    carry_in: tuple[Tensor, ...]
    roots: list[Tensor]
    seeds: list[Tensor | None]
    deferred: list[Deferred]


@dataclass
class Executor:
    """One rank's part of a pipeline (a single stage included); stateless between steps.

    Args:
        bound: the model bound to this rank.
        leaves: its parameters and gradients.
    """

    bound: BoundModel
    leaves: Leaves
    _programs: dict[Schedule, tuple[tuple[object, ...], ...]] = field(default_factory=dict)

    @property
    def program(self) -> ModelProgram:
        """The lowered model."""
        return self.bound.program

    def run(
        self,
        schedule: Schedule,
        consts: Sequence[Mapping[str, Tensor]],
        weights: Mapping[TermKey, Tensor],
    ) -> list[dict[TermKey, Tensor]]:
        """Run all microbatches forward and backward; gradients go into the leaves' buffers.

        Args:
            schedule: for this mesh and number of microbatches.
            consts: per microbatch.
            weights: what each term's sum is divided by.

        Returns:
            Per microbatch the local sums of the terms that this rank's stages have.
        """
        if schedule not in self._programs:
            self._programs = {schedule: rank_programs(schedule)}
        rank = self.bound.comm.coords.get(PIPELINE, 0)
        step = _Step(self, consts, weights, defer=schedule.splits)
        for event in self._programs[schedule][rank]:
            if isinstance(event, Action):
                step.act(event)
            elif isinstance(event, Send):
                step.send(event)
            else:
                assert isinstance(event, Recv)
                step.recv(event)
        step.close()
        return step.sums

    def evaluate(self, consts: Mapping[str, Tensor]) -> dict[TermKey, Tensor]:
        """Run one microbatch forward through all stages, without gradients.

        Returns:
            The local sums of the terms that this rank's stages have.
        """
        comm, program = self.bound.comm, self.program
        rank, stages = comm.coords.get(PIPELINE, 0), program.stage_rank
        sums: dict[TermKey, Tensor] = {}
        carry: tuple[Tensor, ...] = ()
        sending: list[Callable[[], None]] = []
        for stage, holder in enumerate(stages):
            if holder != rank:
                continue
            if stage and stages[stage - 1] != rank:
                carry = tuple(
                    comm.recv_async(
                        ty.local_shape(program.layout.sizes), ty.dtype, PIPELINE, stages[stage - 1]
                    )()
                    for ty in program.carry_types(stage - 1)
                )
            out = self.bound.run(program.entries(stage), self.leaves.of, carry, consts)
            sums.update(out.sums)
            carry = out.carry
            if stage + 1 < len(stages) and stages[stage + 1] != rank:
                sending += [
                    comm.send_async(x.contiguous(), PIPELINE, stages[stage + 1]) for x in carry
                ]
        for wait in sending:
            wait()
        return sums


class _Step:
    """The state of one step: what is live, what has arrived, what is on its way."""

    def __init__(
        self,
        executor: Executor,
        consts: Sequence[Mapping[str, Tensor]],
        weights: Mapping[TermKey, Tensor],
        *,
        defer: bool,
    ) -> None:
        self.defer = defer
        self.queued: dict[tuple[int, int], list[tuple[Deferred, Tensor, Tensor]]] = {}
        self.bound, self.leaves = executor.bound, executor.leaves
        self.program, self.comm = executor.program, executor.bound.comm
        self.consts, self.weights = consts, weights
        self.sums: list[dict[TermKey, Tensor]] = [{} for _ in consts]
        self.live: dict[tuple[int, int], _Live] = {}
        self.outbox: dict[Message, tuple[Tensor, ...]] = {}
        self.inbox: dict[Message, list[Callable[[], Tensor]]] = {}
        self.sending: list[Callable[[], None]] = []
        self.last = len(self.program.stage_rank) - 1

    def act(self, action: Action) -> None:
        if action.kind == "F":
            self.forward(action.stage, action.microbatch)
        elif action.kind == "B":
            self.backward(action.stage, action.microbatch)
        else:
            self.weights_of(action.stage, action.microbatch)

    def forward(self, stage: int, microbatch: int) -> None:
        carry_in: tuple[Tensor, ...] = ()
        if stage > 0:
            types = self.program.carry_types(stage - 1)
            received = self._take(("F", stage, microbatch))
            carry_in = tuple(
                x.detach().requires_grad_(ty.grad) for x, ty in zip(received, types, strict=True)
            )
        out = self.bound.run(
            self.program.entries(stage),
            self.leaves.of,
            carry_in,
            self.consts[microbatch],
            defer=self.defer,
        )
        self.sums[microbatch].update({key: x.detach() for key, x in out.sums.items()})
        roots = list(out.sums.values())
        seeds: list[Tensor | None] = [
            (1.0 / self.weights[key]).to(x.dtype) for key, x in out.sums.items()
        ]
        if stage < self.last:
            self.outbox["F", stage + 1, microbatch] = tuple(x.detach() for x in out.carry)
            flowing = [x for x in out.carry if x.requires_grad]
            roots, seeds = [*flowing, *roots], [*(None for _ in flowing), *seeds]
        self.live[stage, microbatch] = _Live(carry_in, roots, seeds, out.deferred)

    def backward(self, stage: int, microbatch: int) -> None:
        live = self.live.pop((stage, microbatch))
        if stage < self.last:
            cotangents = self._take(("B", stage, microbatch))
            live.seeds[: len(cotangents)] = cotangents
        flowing = [x for x in live.carry_in if x.requires_grad]
        if self.defer:
            grads = self.backward_inputs(stage, microbatch, live, flowing)
        else:
            if live.roots:
                torch.autograd.backward(live.roots, live.seeds)
            grads = [x.grad for x in flowing]
        if stage > 0:
            self.outbox["B", stage - 1, microbatch] = tuple(
                torch.zeros_like(x) if g is None else g for x, g in zip(flowing, grads, strict=True)
            )

    def backward_inputs(
        self, stage: int, microbatch: int, live: _Live, flowing: list[Tensor]
    ) -> list[Tensor | None]:
        """Run a backward that leaves products' weights for `weights_of`; return the carry's."""
        deferred = {id(product.weight) for product in live.deferred}
        entries = self.program.entries(stage)
        leaves = {id(w): w for name, index, _ in entries for w in self.leaves.of[name, index]}
        others = [w for key, w in leaves.items() if key not in deferred]
        slots = [slot for product in live.deferred for slot in product.slots]
        inputs = [*flowing, *others, *slots]
        grads: list[Tensor | None] = [None] * len(inputs)
        if live.roots:
            grads = list(torch.autograd.grad(live.roots, inputs, live.seeds, allow_unused=True))
        for w, g in zip(others, grads[len(flowing) :], strict=False):
            if g is not None:
                self.leaves.add(w, g)
        filled = grads[len(flowing) + len(others) :]
        self.queued[stage, microbatch] = [
            (product, x.detach(), g)
            for product, x, g in zip(live.deferred, filled[::2], filled[1::2], strict=True)
            if x is not None and g is not None
        ]
        return grads[: len(flowing)]

    @torch.no_grad()
    def weights_of(self, stage: int, microbatch: int) -> None:
        """Compute the weight gradients that a backward left, and add them."""
        totals: dict[int, tuple[Tensor, Tensor]] = {}
        for item, x, g in self.queued.pop((stage, microbatch)):
            grad = weight_gradient(item.product, x, g)
            key = id(item.weight)
            totals[key] = (item.weight, totals[key][1] + grad if key in totals else grad)
        for weight, grad in totals.values():
            self.leaves.add(weight, grad)

    def send(self, event: Send) -> None:
        for x in self.outbox.pop(event.message):
            self.sending.append(self.comm.send_async(x.contiguous(), PIPELINE, event.to_rank))

    def recv(self, event: Recv) -> None:
        self.inbox[event.message] = [
            self.comm.recv_async(
                ty.local_shape(self.program.layout.sizes), ty.dtype, PIPELINE, event.from_rank
            )
            for ty in self._message_types(event.message)
        ]

    def _message_types(self, message: Message) -> list[ShardType]:
        kind, stage, _ = message
        if kind == "F":
            return list(self.program.carry_types(stage - 1))
        return [ty for ty in self.program.carry_types(stage) if ty.grad]

    def _take(self, message: Message) -> tuple[Tensor, ...]:
        """Return what another stage has made: from a message, or from this rank's own outbox."""
        if message in self.inbox:
            return tuple(wait() for wait in self.inbox.pop(message))
        return self.outbox.pop(message)

    def close(self) -> None:
        for wait in self.sending:
            wait()
        left = [*self.live, *self.inbox, *self.outbox, *self.queued]
        assert not left, f"the schedule left work behind: {left}"
