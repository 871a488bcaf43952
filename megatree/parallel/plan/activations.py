"""Bytes that autograd keeps between forward and backward, by running a program on fake tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from megatree.parallel.bodies import ShapeComm
from megatree.parallel.codegen import generate
from megatree.parallel.program import Program


@dataclass(frozen=True)
class SavedBytes:
    """What one run of a program keeps for its backward, on one rank.

    Args:
        activations: bytes of saved tensors that are neither parameters, consts nor the carry.
        carry: bytes of the carry that enters (kept if the program saves it).
        carry_out: bytes of the carry that leaves.
    """

    activations: int
    carry: int
    carry_out: int


def saved_bytes(program: Program, *, num_carry_out: int = 0) -> SavedBytes:
    """Run a program's own generated code on fake tensors and count the storages it saves.

    Nothing is allocated. The kernels are those of the CPU (flash attention saves q, k, v, the
    output and a log-sum-exp there as on a GPU).
    """
    sizes = program.mesh_sizes
    comm = ShapeComm(sizes, dict.fromkeys(sizes, 0), device=torch.device("cpu"))
    run = generate(program.graph, comm)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    with FakeTensorMode(), torch.enable_grad():
        inputs = {
            path: torch.empty(ty.local_shape(sizes), dtype=ty.dtype).requires_grad_(ty.grad)
            for path, ty in program.types.items()
        }
        with saved_tensors_hooks(pack, lambda x: x):
            out = run(*inputs.values())
        own = {x.untyped_storage()._cdata: path for path, x in inputs.items()}
        carry = sum(size for key, size in kept.items() if own.get(key, "").startswith("carry"))
        return SavedBytes(
            activations=sum(size for key, size in kept.items() if key not in own),
            carry=carry,
            carry_out=sum(x.numel() * x.element_size() for x in out[:num_carry_out]),
        )
