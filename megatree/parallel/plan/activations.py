"""Bytes that autograd keeps between forward and backward, by running a program on fake tensors."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from megatree.parallel.again import Keep
from megatree.parallel.bodies import ShapeComm
from megatree.parallel.codegen import generate
from megatree.parallel.model import ModelProgram
from megatree.parallel.pieces import Pieces, recomputed
from megatree.parallel.plan.flops import attention_flops, forward_flops, node_flops
from megatree.parallel.program import Collective, Program
from megatree.parallel.remat import Entry, Remat


@dataclass(frozen=True, kw_only=True)
class SavedBytes:
    """What one run of a program keeps for its backward, on one rank.

    Args:
        activations: bytes of kept tensors that are neither parameters, consts nor the carry.
        carry: bytes of the carry that enters, if the program keeps it; else 0.
        carry_in, carry_out: bytes of the carry that enters and of that which leaves.
        num_calls: number of collectives before the last tensor is saved.
    """

    activations: int
    carry: int
    carry_in: int
    carry_out: int
    num_calls: int

    @property
    def kept(self) -> int:
        """The bytes that wait for the backward."""
        return self.activations + self.carry


class _Counted(Keep):
    """Keeps tensors as they are; counts their storages, and the collectives made so far."""

    def __init__(self, comm: ShapeComm) -> None:
        self.comm, self.num_calls = comm, 0
        self.sizes: dict[int, int] = {}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.sizes[storage._cdata] = storage.nbytes()
        self.num_calls = len(self.comm.calls)
        return x


def saved_bytes(
    program: Program,
    *,
    num_carry_out: int = 0,
    remat: Remat = Remat(),  # noqa: B008 (frozen)
) -> SavedBytes:
    """Run a program's own generated code on fake tensors and count the storages it keeps.

    Nothing is allocated. The kernels are those of the CPU (flash attention saves q, k, v, the
    output and a log-sum-exp there as on a GPU).

    Args:
        program: of a unit.
        num_carry_out: how many of its results are the carry.
        remat: if it is "selective", the program runs in pieces, as the layers of a stack then do.
    """
    sizes = program.mesh_sizes
    comm = ShapeComm(sizes, dict.fromkeys(sizes, 0), device=torch.device("cpu"))
    keep = _Counted(comm)
    with FakeTensorMode(), torch.enable_grad():
        inputs = {
            path: torch.empty(ty.local_shape(sizes), dtype=ty.dtype).requires_grad_(ty.grad)
            for path, ty in program.types.items()
        }
        if remat.policy == "selective":
            out = Pieces(program.graph, comm, remat)(*inputs.values(), keep=keep)
        else:
            with keep.hooks():
                out = generate(program.graph, comm)(*inputs.values())
        own = {x.untyped_storage()._cdata for x in inputs.values()}
        carry = [x for path, x in inputs.items() if path.startswith("carry")]
        entering = {x.untyped_storage()._cdata for x in carry}
        return SavedBytes(
            activations=sum(size for key, size in keep.sizes.items() if key not in own),
            carry=sum(size for key, size in keep.sizes.items() if key in entering),
            carry_in=sum(map(_bytes, carry)),
            carry_out=sum(map(_bytes, out[:num_carry_out])),
            num_calls=keep.num_calls,
        )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a stage keeps of one microbatch, and what its backward does again, on one rank.

    Args:
        here: bytes that wait on the device.
        away: bytes that wait on the host.
        plain: bytes that would wait without recomputation or offload.
        again: most bytes that the backward makes again, or brings back, at once.
        flops: of recomputation.
        attention_flops: the part of it in attention.
        collectives: (unit, collective) of recomputation.
    """

    here: int
    away: int
    plain: int
    again: int
    flops: int
    attention_flops: int
    collectives: tuple[tuple[str, Collective], ...]


class Activations:
    """What the stages of a lowered model keep, under its layout's recomputation.

    Args:
        program: a lowered model.
    """

    def __init__(self, program: ModelProgram) -> None:
        self.program, self.remat = program, program.layout.remat
        self._layers = {name for name, index, _ in program.order if index is not None}
        self._found: dict[int, Kept] = {}

    @cached_property
    def _plain(self) -> dict[str, SavedBytes]:
        return {
            name: saved_bytes(unit.program, num_carry_out=unit.num_carry)
            for name, unit in self.program.units.items()
        }

    @cached_property
    def _saved(self) -> dict[str, SavedBytes]:
        if self.remat.policy != "selective":
            return self._plain
        units = self.program.units
        pieces = {name: saved_bytes(units[name].program, remat=self.remat) for name in self._layers}
        return {**self._plain, **pieces}

    def of(self, stage: int) -> Kept:
        """Return what a stage keeps of one microbatch, and what its backward does again."""
        if stage not in self._found:
            self._found[stage] = self._count(stage)
        return self._found[stage]

    def _count(self, stage: int) -> Kept:
        entries = self.program.entries(stage)
        here = away = before = 0
        working = [0]
        repeated: list[tuple[str, Collective]] = []
        flops: list[tuple[int, int]] = []
        groups = self.remat.groups(entries)
        for number, (group, twice) in enumerate(groups):
            names = [name for name, _, _ in group]
            enters = self._plain[names[0]].carry_in
            whole = sum(self._plain[name].kept for name in names)
            kept = enters if twice else self._saved[names[0]].kept
            goes = 0
            if self.remat.offload and names[0] in self._layers:
                # The stage's input is held anyway, to receive its gradient.
                goes = kept - (enters if stage and not number else 0)
            here, away = here + kept - goes, away + goes
            working.append(max(0, whole - kept) + goes + before)
            before = goes
            repeated += [(name, call) for name, call in self._calls(group, twice)]
            flops += [self._flops(name, twice) for name in names]
        if stage + 1 < len(self.program.stage_rank):
            here += self._plain[entries[-1][0]].carry_out  # held until its gradient arrives
        return Kept(
            here=here,
            away=away,
            plain=sum(self._plain[name].kept for name, _, _ in entries),
            again=max(working),
            flops=sum(total for total, _ in flops),
            attention_flops=sum(attention for _, attention in flops),
            collectives=tuple(repeated),
        )

    def _again(self, name: str) -> list[fx.Node]:
        """Return the nodes of a unit that its backward runs again, one by one."""
        if name not in self._layers:
            return []
        nodes = self.program.units[name].program.graph.nodes
        return [node for node in nodes if recomputed(self.remat, node)]

    def _calls(self, group: list[Entry], twice: bool) -> list[tuple[str, Collective]]:
        """Return the collectives of a group's forward that its backward repeats."""
        out: list[tuple[str, Collective]] = []
        for name, _, _ in group:
            program = self.program.units[name].program
            nodes = list(program.graph.nodes) if twice else self._again(name)
            calls = [c for node in nodes for c in program.collectives_of(node)]
            out += [(name, c) for c in calls if c.phase == "forward"]
        if twice:  # up to the last tensor that the group saves
            last = self.program.units[group[-1][0]].program
            made = sum(c.phase == "forward" for c in last.collectives)
            del out[len(out) - made + self._plain[group[-1][0]].num_calls :]
        return out

    def _flops(self, name: str, twice: bool) -> tuple[int, int]:
        """Return the FLOPs that a backward repeats, and those of them in attention."""
        program = self.program.units[name].program
        if twice:
            return forward_flops(program, local=True), attention_flops(program, local=True)
        counts = [node_flops(n, program.mesh_sizes, local=True) for n in self._again(name)]
        return sum(counts), sum(counts)  # no product runs again, so all of it is attention
