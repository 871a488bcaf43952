"""Megatron's optimizer state as named tensors of each rank, whatever it was kept in.

Three places have it: flat buffers in distrib_optim.pt (the distributed optimizer), tensors by
number in the model's archive (the plain one), flat buckets of `torch_dist` (`dp_reshardable`). All
come out as `optimizer.state.exp_avg.NAME`, as `torch_dist` has them where it is reshardable.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatree.io.checkpoint.box import Box
from megatree.io.formats.arrays import Array, grid
from megatree.io.formats.flat import Buffer, Slot, lay_out, read_box
from megatree.io.formats.shards import Part, part_of

STATE = "optimizer.state."
KEYS = ("param", "exp_avg", "exp_avg_sq")
MASTER, MOMENTS = f"{STATE}param.", (f"{STATE}exp_avg.", f"{STATE}exp_avg_sq.")
BUCKET = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(.*\)"
    r"\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)",
    re.ASCII,
)
"""Name of a bucket: (rank of the model, chunk of it, number, what of it)."""
# Elements of each parameter that are looked at to know whether masters lie where they should.
_LOOKED_AT = 512
_WEIGHTS_ONLY = "Convert with --weights-only"

Parts = dict[str, Part]


def from_buffers(
    chunks: Sequence[Parts],
    buffers: Mapping[Any, Any],
    apart: Collection[str],
    bucket_sizes: Sequence[int | None],
    place: str,
) -> list[Parts]:
    """Return the state that distrib_optim.pt holds.

    Args:
        chunks: per chunk of the model, its parameters in order.
        buffers: chunk -> dtypes -> tensors by key.
        apart: parameters with a bucket of their own.
        bucket_sizes: what may have ended the buckets, likeliest first.
        place: for errors.

    Raises:
        ValueError: the buffers are not those of these parameters.
    """
    if not buffers.get("buckets_coalesced"):
        raise ValueError(
            f"{place}: its buffers are of before February 2024. Load it in Megatron with "
            f"--ckpt-convert-update-legacy-dist-opt-format and save it anew, or "
            f"{_WEIGHTS_ONLY.lower()}."
        )
    out = []
    for number, chunk in enumerate(chunks):
        held = list((buffers.get(number) or {}).values())
        kinds = {key: x for key, x in held[0].items() if key in KEYS} if len(held) == 1 else {}
        if sorted(kinds) != sorted(KEYS) or not all(isinstance(x, Tensor) for x in kinds.values()):
            raise ValueError(
                f"{place}: chunk {number} of the model has {len(held)} buffers with "
                f"{', '.join(map(str, kinds)) or 'nothing that is known'}, not one with "
                f"{', '.join(KEYS)}. {_WEIGHTS_ONLY}."
            )
        shapes = {name: part.array.shape for name, part in chunk.items()}
        total = kinds["param"].numel()
        found = [lay_out(shapes, apart, bucket_size=size) for size in bucket_sizes]
        fitting = [buffer for buffer in found if sum(buffer.sizes) == total]
        if not fitting:
            sums = ", ".join(str(sum(buffer.sizes)) for buffer in found)
            raise ValueError(
                f"{place}: its buffer {number} has {total} elements, the parameters of the model "
                f"take {sums}. Take the files of one run, or {_WEIGHTS_ONLY.lower()}."
            )

        states = [_buffer_state(buffer, kinds) for buffer in fitting]
        out.append(agreeing(states, chunk, place))
    return out


def _buffer_state(buffer: Buffer, flat: Mapping[str, Tensor]) -> Parts:
    return {
        f"{STATE}{key}.{slot.name}": _flat_part(
            slot, buffer.at(slot), flat[key].dtype, partial(_read_flat, flat[key])
        )
        for key in KEYS
        for slot in buffer.slots
    }


def _read_flat(flat: Tensor, low: int, high: int) -> Tensor:
    return flat.detach()[low:high].clone()


def _flat_part(
    slot: Slot, start: int, dtype: torch.dtype, read: Callable[[int, int], Tensor]
) -> Part:
    array = Array(shape=slot.shape, dtype=dtype)
    return Part(array=array, read=partial(read_box, slot.shape, start, read))


def from_buckets(
    chunk: Parts,
    buckets: Mapping[str, Sequence[tuple[int, torch.dtype, Callable[[int, int], Tensor]]]],
    apart: Collection[str],
    orders: Sequence[Sequence[str]],
    place: str,
) -> Parts:
    """Return the state that the buckets of `dp_reshardable` hold.

    Args:
        chunk: the parameters of a chunk of a rank's model.
        buckets: key -> per bucket its elements, dtype and how a range of it is read.
        apart: parameters with a bucket of their own.
        orders: of the parameters' names, likeliest first.
        place: for errors.

    Raises:
        ValueError: the buckets are not those of these parameters.
    """
    sizes = [size for size, _, _ in buckets[KEYS[0]]]
    if any([size for size, _, _ in held] != sizes for held in buckets.values()):
        raise ValueError(f"{place}: its buckets differ between {', '.join(buckets)}. Copy it anew.")
    found = []
    for order in orders:
        shapes = {name: chunk[name].array.shape for name in order}
        buffer = lay_out(shapes, apart, sizes=sizes)
        if list(buffer.sizes) == sizes:
            found.append(
                {
                    f"{STATE}{key}.{slot.name}": _flat_part(
                        slot, slot.start, *held[slot.bucket][1:]
                    )
                    for key, held in buckets.items()
                    for slot in buffer.slots
                }
            )
    if not found:
        raise ValueError(
            f"{place}: its buckets have {', '.join(map(str, sizes))} elements, and the parameters "
            f"of the model do not end there. {_WEIGHTS_ONLY}."
        )
    return agreeing(found, chunk, place)


def agreeing(states: Sequence[Parts], chunk: Parts, place: str) -> Parts:
    """Return the first of several readings of one state whose masters are those of the weights.

    Raises:
        ValueError: none is.
    """
    wrong = ""
    for state in states:
        wrong = next((name for name in chunk if not _is_master(state, chunk, name)), "")
        if not wrong:
            return state
    raise ValueError(
        f"{place}: the masters of {wrong} are not its weights: the optimizer is of another run, or "
        f"its parameters are in an order that is not known. {_WEIGHTS_ONLY}."
    )


def _is_master(state: Parts, chunk: Parts, name: str) -> bool:
    part, held = state[f"{MASTER}{name}"], chunk[name]
    size = held.array.dtype.itemsize
    box: Box = next(iter(grid(held.array, _LOOKED_AT * size)), ())
    return torch.equal(part.read(box).to(held.array.dtype), held.read(box))


def from_numbers(chunks: Sequence[Parts], optimizer: Mapping[str, Any], place: str) -> list[Parts]:
    """Return the state that the plain optimizer keeps by the numbers of parameters.

    Groups follow one another: those with weight decay, then vectors and biases.

    Args:
        chunks: per chunk of the model, its parameters in order.
        optimizer: state and param_groups, or those under "optimizer" with masters beside.
        place: for errors.

    Raises:
        ValueError: the numbers are not those of these parameters.
    """
    inner = optimizer.get("optimizer", optimizer)
    masters = optimizer.get("fp32_from_fp16_params") or optimizer.get("fp32_from_fp16")
    groups = inner["param_groups"]
    names = [(number, name) for number, chunk in enumerate(chunks) for name in chunk]
    out: list[Parts] = [{} for _ in chunks]
    for index, group in enumerate(groups):
        mine = [n for n in names if len(groups) == 1 or decays(*_named(chunks, n)) == _has(group)]
        if len(mine) != len(group["params"]):
            raise ValueError(
                f"{place}: group {index} of its optimizer has {len(group['params'])} parameters, "
                f"the model {len(mine)} with weight decay factor {group.get('wd_mult')}. "
                f"{_WEIGHTS_ONLY}."
            )
        for at, (number, (chunk, name)) in enumerate(zip(group["params"], mine, strict=True)):
            held = {key: inner["state"].get(number, {}).get(key) for key in KEYS[1:]}
            if masters is not None:
                held["param"] = masters[index][at]
            for key, value in held.items():
                shape = chunks[chunk][name].array.shape
                if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                    found = list(value.shape) if isinstance(value, Tensor) else "absent"
                    raise ValueError(
                        f"{place}: {key} of parameter {number} is {found}, and {name}, which it "
                        f"should be of, is {list(shape)}. {_WEIGHTS_ONLY}."
                    )
                out[chunk][f"{STATE}{key}.{name}"] = part_of(value)
    if masters is not None:
        for state, chunk in zip(out, chunks, strict=True):
            agreeing([state], chunk, place)
    return out


def _named(chunks: Sequence[Parts], at: tuple[int, str]) -> tuple[str, tuple[int, ...]]:
    return at[1], chunks[at[0]][at[1]].array.shape


def _has(group: Mapping[str, Any]) -> bool:
    return bool(group.get("wd_mult", group.get("weight_decay", 1.0)))


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether Megatron's weight decay takes a parameter: no vector and no bias."""
    return len(shape) > 1 and not name.endswith(".bias")


def steps_of(optimizer: Any) -> int | None:
    """Return how many updates an optimizer made, where it says so."""
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, Mapping) else None
    if not isinstance(inner, Mapping):
        return None
    told = [group.get("step") for group in inner.get("param_groups") or ()]
    state = inner.get("state")
    if isinstance(state, Mapping):
        told.append(state.get("common_step"))
        told += [one.get("step") for one in state.values() if isinstance(one, Mapping)]
    found = {int(step) for step in told if isinstance(step, (int, float, Tensor))}
    return found.pop() if len(found) == 1 else None


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the groups of an optimizer without its parameters."""
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, Mapping) else None
    groups = inner.get("param_groups") if isinstance(inner, Mapping) else None
    return [{key: x for key, x in group.items() if key != "params"} for group in groups or ()]
