"""Text from a model, the simple way: the whole sequence anew for every token."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatree.functional import keys
from megatree.functional.chain import Chain
from megatree.io import checkpoint
from megatree.io.world import World
from megatree.parallel.comm import RankComm
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import PIPELINE, Layout, spec_box
from megatree.parallel.model import ModelProgram, lower_model
from megatree.parallel.packing import Group, pack
from megatree.parallel.storage import Storage
from megatree.parallel.types import ShardType
from megatree.runtime.forward import BoundModel, Leaves
from megatree.runtime.pieces import buffer_pieces
from megatree.runtime.stages import run_stages

Choose = Callable[[Tensor, int], Tensor]
"""(logits [rows, vocab], how many tokens have been chosen) -> one token id per row."""


SEQUENCE = ("seq", "seq_res", "seq_moe")
"""Names of the sequence: in attention, along the residual stream, on the way to experts."""


@dataclass(frozen=True)
class Generator:
    """A model's logits on one rank, for sequences of one padded length."""

    bound: BoundModel
    leaves: Leaves
    world: World

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        choose: Choose,
        *,
        end: int | None = None,
    ) -> list[list[int]]:
        """Continue every prompt; every rank calls it and returns the same.

        Args:
            prompts: token ids, at least one each; as many prompts as the model's batch has rows.
            num_tokens: tokens to add.
            choose: picks the next tokens; rank 0's choice holds.
            end: a row stops before this token.

        Returns:
            The new tokens of every row.

        Raises:
            ValueError: a prompt is empty, or a row would be longer than the model's sequence.
        """
        sizes = self.bound.program.model.sizes
        _check_prompts(prompts, num_tokens, sizes["batch"], sizes["seq"])
        rows = torch.zeros(sizes["batch"], sizes["seq"], dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        done = torch.zeros(sizes["batch"], dtype=torch.bool)
        out: list[list[int]] = [[] for _ in prompts]
        for number in range(num_tokens):
            chosen = self._next(rows, lengths, number, choose)
            done |= torch.tensor([token == end for token in chosen])
            if done.all():
                break
            for row, token in enumerate(chosen):
                if not done[row]:
                    out[row].append(token)
                    rows[row, lengths[row]] = token
                    lengths[row] += 1
        return out

    def _next(self, rows: Tensor, lengths: Tensor, number: int, choose: Choose) -> list[int]:
        logits = self.logits(rows, lengths - 1)
        # One rank decides for all: logits may differ in the last bit, and so would choices.
        mine = choose(logits, number).tolist() if self.world.rank == 0 else None
        return self.world.broadcast(mine)

    @torch.no_grad()
    def logits(self, rows: Tensor, at: Tensor) -> Tensor:
        """Return the logits after position `at` of every row, [rows, vocab], on every rank."""
        program, comm = self.bound.program, self.bound.comm
        types = program.consts.types
        whole = {
            "tokens": rows,
            "labels": torch.zeros_like(rows),
            "weights": torch.ones(rows.shape, dtype=torch.float32),
        }
        local = {}
        for name, array in whole.items():
            ty = types[f"batch.{name}"]
            box = spec_box(ty.spec, ty.shape, comm.sizes, comm.coords)
            local[name] = array[tuple(slice(*edge) for edge in box)].to(comm.device)
        out = run_stages(self.bound, self.leaves, self.bound.consts(local))
        ty = program.units[program.order[-1][0]].program.out_types[0]
        (first, last), _, vocab = spec_box(ty.spec, ty.shape, comm.sizes, comm.coords)
        if out.carry:
            picked = out.carry[0][torch.arange(last - first), at[first:last].to(comm.device)]
        else:  # the logits are those of the last stage
            picked = torch.zeros(
                last - first, vocab[1] - vocab[0], dtype=ty.dtype, device=comm.device
            )
        if PIPELINE in comm.sizes:
            picked = comm.psum(picked.contiguous(), (PIPELINE,))
        return _whole(picked, ty, comm)[:, : program.model.sizes["vocab"]].float().cpu()


def load_generator(
    path: str, model: Chain, layout: Layout, *, comm: RankComm, world: World
) -> Generator:
    """Read the parameters of a checkpoint, written under any layout, for generation.

    Args:
        path: the checkpoint.
        model: ends with its logits; its sizes are those of the sequences to come.
        layout: mesh and rules.
        comm: this rank's collectives.
        world: the processes.

    Raises:
        ShardingError: the model cannot be typed under this layout, or it cuts the sequence.
        ValueError: the checkpoint is of another model.
    """
    program = lower_model(model, layout)
    if cut := program.consts.types["batch.tokens"].spec[1]:
        raise ShardingError(
            f"generate: the sequence is cut over {' '.join(cut)}, and a prompt's next token is on "
            "one rank. Use a layout without a rule for 'seq'."
        )
    rank = comm.coords.get(PIPELINE, 0)
    groups = pack(program, stage_rank=rank, storage=Storage())
    buffers = {group.name: group.allocate(group.dtype, comm.device) for group in groups}
    pieces = list(buffer_pieces(program, groups, comm, buffers, "params"))
    checkpoint.load(path, pieces, world=world, allow_extra=("opt.*", "params.mtp.*"))
    return Generator(BoundModel(program, comm), _leaves(program, groups, buffers, rank), world)


def greedy(logits: Tensor, number: int) -> Tensor:
    """Choose the likeliest token."""
    return logits.argmax(-1)


def sampling(*, temperature: float, seed: int) -> Choose:
    """Return draws with probability softmax(logits / temperature), by (seed, number, row, token).

    Raises:
        ValueError: the temperature is not positive.

    Reference: Gumbel 1954: the argmax of logits plus Gumbel noise is such a draw.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature: {temperature}. Give a positive one, or choose greedily.")

    def choose(logits: Tensor, number: int) -> Tensor:
        index = keys.box_index(tuple(logits.shape), tuple((0, n) for n in logits.shape))
        bits = keys.bits(keys.fold(seed, "generate", number), index)
        uniform = ((bits >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
        return (logits.double() / temperature - (-uniform.log()).log()).argmax(-1)

    return choose


def padded_length(longest: int, layout: Layout, most: int) -> int:
    """Return the least sequence length that holds `longest` tokens and divides over the layout."""
    parts = 1
    for axis in SEQUENCE:
        sizes = [layout.mesh.sizes[mesh_axis] for mesh_axis in layout.axes(axis)]
        parts = math.lcm(parts, math.prod(sizes))
    return min(-(-longest // parts) * parts, most)


def _check_prompts(
    prompts: Sequence[Sequence[int]], num_tokens: int, num_rows: int, seq: int
) -> None:
    if len(prompts) != num_rows:
        raise ValueError(
            f"generate: {len(prompts)} prompts, the model was lowered for {num_rows} rows. "
            "Lower it for as many rows as there are prompts."
        )
    if empty := [row for row, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"generate: prompt {empty[0]} has no token. Give it at least one.")
    longest = max(map(len, prompts))
    if longest + num_tokens > seq:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {num_tokens} new ones make "
            f"{longest + num_tokens}, the model's sequence has {seq}. "
            f"Ask for at most {max(0, seq - longest)} new tokens."
        )


def _leaves(
    program: ModelProgram, groups: Sequence[Group], buffers: dict[str, Tensor], rank: int
) -> Leaves:
    """Return the parameters of a pipeline rank's units and layers as views of the buffers."""
    table = {
        (leaf.path, layer): view
        for group in groups
        for leaf, layer, view in group.rows(buffers[group.name])
    }
    return {
        (name, index): [
            table[path, index] if (path, index) in table else table[path, None]
            for path in program.units[name].leaves.values()
        ]
        for (name, index, _), stage in zip(program.order, program.stages, strict=True)
        if program.stage_rank[stage] == rank
    }


def _whole(x: Tensor, ty: ShardType, comm: RankComm) -> Tensor:
    """Gather [rows, vocab], cut as a value [rows, seq, vocab] of this type is."""
    rows, vocab = ty.spec[0], ty.spec[2]
    if rows:
        x = comm.all_gather(x.contiguous(), rows, 0)
    return comm.all_gather(x.contiguous(), vocab, 1) if vocab else x
