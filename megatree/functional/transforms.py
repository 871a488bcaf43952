"""Which derivatives are being taken of a function, for fused kernels that have no rule for some."""

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def only_reverse(*xs: Tensor) -> bool:
    """Whether nothing but one reverse-mode derivative may be asked for.

    False under vmap, forward mode and nested `torch.func.grad`. A second derivative by
    `torch.autograd.grad(create_graph=True)` cannot be seen here.
    """
    if torch.compiler.is_compiling():
        return True
    stack = _functorch.get_interpreter_stack() or []
    if len(stack) > 1 or any(level.key() != _functorch.TransformType.Grad for level in stack):
        return False
    return all(forward_ad.unpack_dual(x).tangent is None for x in xs)


def plain(*xs: Tensor) -> bool:
    """Whether the tensors are ordinary: no function transform, no forward mode, no compiler."""
    if torch.compiler.is_compiling() or _functorch.get_interpreter_stack():
        return False
    return all(forward_ad.unpack_dual(x).tangent is None for x in xs)
