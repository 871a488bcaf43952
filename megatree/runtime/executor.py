"""Run a schedule on one rank: forwards, backwards and messages in one global order."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from megatree.parallel.layout import PIPELINE
from megatree.parallel.model import ModelProgram
from megatree.parallel.schedule import Action, Event, Recv, Schedule, Send, rank_programs, validate
from megatree.runtime.forward import BoundModel, Deferred, TermKey
from megatree.runtime.leaves import Leaves
from megatree.runtime.stages import Stage, stages_of


@dataclass(frozen=True)
class Outputs:
    """What a rank's stages compute of one microbatch, beside gradients.

    Args:
        sums: (unit, number, term) -> local sum.
        metrics: (unit, number, name) -> local value.
    """

    sums: dict[TermKey, Tensor] = field(default_factory=dict)
    metrics: dict[TermKey, Tensor] = field(default_factory=dict)


@dataclass
class Executor:
    """One rank's part of a pipeline (a single stage included); stateless between steps.

    Args:
        bound: the model bound to this rank.
        leaves: its parameters and gradients.
    """

    bound: BoundModel
    leaves: Leaves
    _programs: dict[Schedule, tuple[tuple[Event, ...], ...]] = field(default_factory=dict)

    @property
    def program(self) -> ModelProgram:
        """The lowered model."""
        return self.bound.program

    @cached_property
    def stages(self) -> dict[int, Stage]:
        """This rank's stages, by number."""
        return stages_of(self.program, self.bound.comm.coords.get(PIPELINE, 0))

    def run(
        self,
        schedule: Schedule,
        consts: Sequence[Mapping[str, Tensor]],
        weights: Mapping[TermKey, Tensor],
        *,
        scale: float | Tensor = 1.0,
    ) -> list[Outputs]:
        """Run all microbatches forward and backward; gradients go into the leaves' buffers.

        Args:
            schedule: for this mesh and number of microbatches.
            consts: per microbatch.
            weights: what each term's sum is divided by.
            scale: multiplies all gradients.

        Returns:
            Per microbatch what this rank's stages compute.

        Raises:
            ValueError: the schedule breaks a law (see `validate`).
        """
        if schedule not in self._programs:
            validate(schedule)
            self._programs = {schedule: rank_programs(schedule)}
        rank = self.bound.comm.coords.get(PIPELINE, 0)
        step = _Step(self, consts, weights, scale, defer=schedule.splits)
        for event in self._programs[schedule][rank]:
            if isinstance(event, Action):
                step.act(event)
            elif isinstance(event, Send):
                step.send(event)
            else:
                step.recv(event)
        step.close()
        return step.outputs


@dataclass
class _Live:
    """What a stage keeps of a microbatch between its forward and its backward.

    `flows` says of every gradient that comes back whether the carry that left needs it.
    """

    carry_in: tuple[Tensor, ...]
    flows: list[bool]
    roots: list[Tensor]
    seeds: list[Tensor]
    deferred: list[Deferred]


@dataclass
class _Arrival:
    """A receive that is posted, and how many sends to that rank were posted before it."""

    event: Recv
    waits: list[Callable[[], Tensor]]
    num_sent: int


class _Channel:
    """This rank's sends to another: their tensors live until they are known to have left."""

    def __init__(self) -> None:
        self.num_sent = self.num_done = 0
        self.waits: deque[Callable[[], None]] = deque()

    def add(self, wait: Callable[[], None]) -> None:
        self.waits.append(wait)
        self.num_sent += 1

    def finish(self, until: int) -> None:
        """Wait for the first `until` sends; the other rank has posted their receives."""
        while self.num_done < until:
            self.waits.popleft()()
            self.num_done += 1


class _Step:
    """The state of one step: what is live, what has arrived, what is on its way."""

    def __init__(
        self,
        executor: Executor,
        consts: Sequence[Mapping[str, Tensor]],
        weights: Mapping[TermKey, Tensor],
        scale: float | Tensor,
        *,
        defer: bool,
    ) -> None:
        self.defer = defer
        self.queued: dict[Action, list[tuple[Deferred, Tensor, Tensor]]] = {}
        self.bound, self.leaves = executor.bound, executor.leaves
        self.comm, self.stages = executor.bound.comm, executor.stages
        self.consts = consts
        self.seeds = {key: scale / weight for key, weight in weights.items()}
        self.outputs = [Outputs() for _ in consts]
        self.live: dict[tuple[int, int], _Live] = {}
        self.outbox: dict[Action, tuple[Tensor, ...]] = {}
        self.inbox: dict[Action, _Arrival] = {}
        self.channels: dict[int, _Channel] = {}

    def act(self, action: Action) -> None:
        if action.kind == "F":
            self.forward(action)
        elif action.kind == "B":
            self.backward(action)
        else:
            self.weights_of(action)

    def forward(self, action: Action) -> None:
        _, number, microbatch = action
        stage = self.stages[number]
        carry_in: tuple[Tensor, ...] = ()
        if number > 0:
            carry_in = tuple(
                x.detach().requires_grad_(grad)
                for x, grad in zip(self._take(action), stage.takes_grad, strict=True)
            )
        out = self.bound.run(
            stage.entries,
            self.leaves.of,
            carry_in,
            self.consts[microbatch],
            defer=self.defer,
            keep=self.leaves.keep,
            again=self.leaves.again,
            add_product=self.leaves.add_product,
        )
        outputs = self.outputs[microbatch]
        outputs.metrics.update(out.metrics)
        flows: list[bool] = []
        roots: list[Tensor] = []
        if not stage.is_last:
            self.outbox[Action("F", number + 1, microbatch)] = tuple(x.detach() for x in out.carry)
            leaving = [x for x, g in zip(out.carry, stage.gives_grad, strict=True) if g]
            flows = [x.requires_grad for x in leaving]
            roots = [x for x in leaving if x.requires_grad]
        seeds: list[Tensor] = []
        for key, total in out.sums.items():
            outputs.sums[key] = total.detach()
            roots.append(total)
            seeds.append(self.seeds[key].to(total.dtype))
        self.live[number, microbatch] = _Live(carry_in, flows, roots, seeds, out.deferred)

    def backward(self, action: Action) -> None:
        _, number, microbatch = action
        live = self.live.pop((number, microbatch))
        seeds = live.seeds
        if not self.stages[number].is_last:
            arrived = zip(self._take(action), live.flows, strict=True)
            seeds = [*(g for g, flows in arrived if flows), *seeds]
        flowing = [x for x in live.carry_in if x.requires_grad]
        if self.defer:
            grads = self.backward_inputs(action, live, flowing, seeds)
        else:
            if live.roots:
                torch.autograd.backward(live.roots, seeds)
            grads = [x.grad for x in flowing]
        if number > 0:
            self.outbox[Action("B", number - 1, microbatch)] = tuple(
                torch.zeros_like(x) if g is None else g for x, g in zip(flowing, grads, strict=True)
            )

    def backward_inputs(
        self, action: Action, live: _Live, flowing: list[Tensor], seeds: list[Tensor]
    ) -> list[Tensor | None]:
        """Run a backward that leaves products' weights for `weights_of`; return the carry's."""
        deferred = {key for product in live.deferred for key in product.weights}
        entries = [(name, index) for name, index, _ in self.stages[action.stage].entries]
        others = self.leaves.inputs(entries, without=deferred)
        slots = [slot for product in live.deferred for slot in product.slots]
        inputs = [*flowing, *others.values(), *slots]
        grads: list[Tensor | None] = [None] * len(inputs)
        if live.roots:
            grads = list(torch.autograd.grad(live.roots, inputs, seeds, allow_unused=True))
        first = len(flowing) + len(others)
        for key, g in zip(others, grads[len(flowing) : first], strict=True):
            if g is not None:
                self.leaves.add(key, g)
        self.queued[action._replace(kind="W")] = [
            (product, x.detach(), g)
            for product, x, g in zip(
                live.deferred, grads[first::2], grads[first + 1 :: 2], strict=True
            )
            if x is not None and g is not None
        ]
        return grads[: len(flowing)]

    @torch.no_grad()
    def weights_of(self, action: Action) -> None:
        """Compute the weight gradients that a backward left, and add them."""
        items = self.queued.pop(action)
        left = Counter(key for item, _, _ in items for key in item.weights)
        entries: dict[tuple[str, int | None], set[tuple[str, int | None]]] = {}
        for item, x, g in items:
            arrivals = []
            for key in item.weights:
                left[key] -= 1
                entries.setdefault(key, set()).add(item.entry)
                arrivals.append(0 if left[key] else len(entries[key]))
            self.leaves.add_product(item.weights, item.product, x, g, arrivals=arrivals)

    def send(self, event: Send) -> None:
        channel = self.channels.setdefault(event.to_rank, _Channel())
        comm = self.comm.at(_named(event.message))
        for x in self.outbox.pop(event.message):
            channel.add(comm.send_async(x.contiguous(), PIPELINE, event.to_rank))

    def recv(self, event: Recv) -> None:
        message, source = event.message, event.from_rank
        stage = self.stages[message.stage]
        parts = stage.enters if message.kind == "F" else stage.cotangents
        channel = self.channels.setdefault(source, _Channel())
        comm = self.comm.at(_named(message))
        waits = [comm.recv_async(*part, PIPELINE, source) for part in parts]
        self.inbox[message] = _Arrival(event, waits, channel.num_sent)

    def _take(self, message: Action) -> tuple[Tensor, ...]:
        """Return what another stage has made: from a message, or from this rank's own outbox."""
        arrival = self.inbox.pop(message, None)
        if arrival is None:
            return self.outbox.pop(message)
        got = tuple(wait() for wait in arrival.waits)
        # All ranks post their messages in one order, so the source has posted what was before.
        self.channels[arrival.event.from_rank].finish(arrival.num_sent)
        return got

    def close(self) -> None:
        for channel in self.channels.values():
            channel.finish(channel.num_sent)
        left = [*self.live, *self.inbox, *self.outbox, *self.queued]
        assert not left, f"the schedule left work behind: {left}"


def _named(message: Action) -> str:
    what = "input" if message.kind == "F" else "cotangent"
    return f"{what} of stage {message.stage}, microbatch {message.microbatch}"
