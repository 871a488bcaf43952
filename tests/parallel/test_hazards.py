"""What would silently go wrong in a traced function: each an error that names the line and the fix."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import megatree.functional as F
from megatree.functional.annotate import as_partial, shard
from megatree.functional.op import op
from megatree.functional.param import Array, Param
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.lower import lower
from megatree.parallel.mesh import Mesh

SIZES = {"batch": 4, "seq": 6, "embed": 8, "ffn": 12, "heads": 4}
LAYOUT = Layout(Mesh(dp=2, tp=2), Rules(batch="dp", ffn="tp", heads="tp"))
X = Array("batch seq embed", grad=True)
H = Array("batch seq ffn", grad=True)
DOWN = Param("ffn embed")
HERE = r"parallel/test_hazards\.py:\d+: "


def low(fn: Callable[..., Any], *abstract: Any) -> None:
    lower(fn, LAYOUT, *(abstract or (X,)), sizes=SIZES)


def product(h: Tensor, w: Tensor) -> Tensor:
    """Contract a cut dim: the result is a pending sum over tp."""
    return F.einsum("b t f, f d -> b t d", h, w)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def under(context: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    def fn(x: Tensor) -> Tensor:
        with context():
            return x * 2

    return fn


def item_assignment(x: Tensor) -> Tensor:
    x[0] = 1.0
    return x


def augmented(x: Tensor) -> Tensor:
    x += 1.0
    return x


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def attribute(x: Tensor) -> Tensor:
    x.data = x * 2
    return x


PYTHON = r"a value flows into Python here, where every rank has only its part\. Use torch\.where or a"
IN_PLACE = r"an in-place write to a typed tensor\. Write the out-of-place form"


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (
            lambda x: Double.apply(x),
            r"mul: a torch\.autograd\.Function is applied to a typed tensor; its own backward would "
            r"be lost\. Declare the function that applies it with @op\(",
        ),
        (
            under(torch.no_grad),
            r"mul: a no_grad context is active, which a lowered program does not keep\. "
            r"Use F\.stop_gradient on the value\.",
        ),
        (under(torch.inference_mode), r"mul: a no_grad context is active"),
        (
            under(lambda: torch.autocast("cpu", torch.bfloat16)),
            r"mul: a autocast context is active, .* Cast with F\.cast, or give parameters a dtype\.",
        ),
        (
            under(lambda: sdpa_kernel(SDPBackend.MATH)),
            r"mul: a sdpa_kernel context is active, .* Choose the kernel with F\.attention\(",
        ),
        (
            lambda x: x + torch.ones(8).numpy().sum() * OUTSIDE,
            r"add: mixes a plain tensor \[8\] with a typed one \(float32\[4/dp, 6, 8\]\); whether it "
            r"is whole or a shard cannot be known\. Pass it as an input, or make it inside",
        ),
        (lambda x: x * x.sum().item(), "item: " + PYTHON),
        (branch, "bool: " + PYTHON),
        (lambda x: x.tolist(), "tolist: " + PYTHON),
        (lambda x: x[int(x.sum())], "int: " + PYTHON),
        (lambda x: list(x), "iter: " + PYTHON),
        (lambda x: 3.0 in x, "contains: " + PYTHON),
        (lambda x: torch.equal(x, x), "equal: " + PYTHON),
        (lambda x: torch.tensor(x.sum()), r"tensor: makes a constant from a typed tensor"),
        (lambda x: torch.full((2,), x.sum()), r"full: makes a constant from a typed tensor"),
        (lambda x: x.add_(1), "add_: " + IN_PLACE),
        (augmented, "add_: " + IN_PLACE),
        (item_assignment, "__setitem__: " + IN_PLACE),
        (lambda x: x.requires_grad_(), "requires_grad_: " + IN_PLACE),
        (
            lambda x: torch.add(x, 1, out=x),
            r"add: out= is an in-place write\. Use the result\.",
        ),
        (
            lambda x: torch.nn.functional.relu(x, inplace=True),
            r"relu: inplace= is an in-place write\. Use the result\.",
        ),
        (
            attribute,
            r"data: an attribute of a typed tensor is written, which a lowered program does not "
            r"keep\. Return a new value\.",
        ),
        (
            lambda x: x + torch.randn(8),
            r"randn draws from torch's random state, which differs by rank and mesh\. "
            r"Use F\.dropout with a key, or megatree\.functional\.keys\.",
        ),
        (lambda x: torch.nn.functional.dropout(x), "dropout draws from torch's random state"),
        (
            lambda x: x.to("cuda"),
            r"to: moves a typed tensor to a device\. Lowered programs run on the rank's device; "
            r"drop the device argument\.",
        ),
        (lambda x: x.to(torch.device("cpu")), "to: moves a typed tensor to a device"),
        (lambda x: x.cpu(), "cpu: moves a typed tensor to a device"),
        (
            lambda x: x.nonzero(),
            r"no sharding rule for nonzero \(operands float32\[4/dp, 6, 8\]\)\. Declare it with "
            r'@op\("\.\.\."\), write it with the vocabulary, or wrap the code in local_map\.',
        ),
        (lambda x: x.grad, "no sharding rule for grad "),
        (lambda x: torch.where(x > 0), r"where\(condition\): the result's shape depends on data"),
        (lambda x: x[[0, 1]], r"indexing float32\[4/dp, 6, 8\] with a tensor or list has no sharding"),
        (lambda x: x[x > 0], r"indexing float32\[4/dp, 6, 8\] with a tensor or list"),
        (
            lambda x: torch.func.grad(lambda y: (y * y).sum())(x),
            r"a torch\.func transform \(grad, vmap, jvp\) is applied to a typed tensor",
        ),
        (lambda x: torch.func.vmap(lambda y: y * 2)(x), r"a torch\.func transform"),
        (
            lambda x: x.flatten(0, 1).reshape(6, 4, 8).flatten(0, 1),
            r"reshape: .*|flatten: ",
        ),
        (
            lambda x: x.transpose(0, 1).flatten(0, 1),
            r"flatten float32\[6, 4/dp, 8\] -> \[24, 8\]: dim 1 is cut over \('dp',\) and merged "
            r"behind another dim, so shards would interleave\. Put the cut dim first in its group, "
            r"or keep the dims apart\.",
        ),
        (
            lambda x: x.unflatten(0, (1, 4)).unflatten(1, (1, 4)).flatten(0, 2).view(4, 48)[:2],
            r"getitem: operand 0 \(float32\[4/dp, 48\]\) is cut on dim 0 over \('dp',\), and the op "
            r"needs that dim whole\. Insert shard\(x, \.\.\.\) with a whole axis there\.",
        ),
        (
            lambda x: torch.softmax(x, 0),
            r"softmax: operand 0 \(float32\[4/dp, 6, 8\]\) is cut on dim 0 over \('dp',\), and the op "
            r"needs that dim whole\.",
        ),
        (
            lambda x: x.reshape(-1).view(torch.int32),
            r"view: reads the bytes of float32\[192/dp\] as torch\.int32, which has no sharding rule",
        ),
        (
            lambda x: shard(x, "batch seq"),
            r"shard 'batch seq': names 2 axes, the value has 3 dims \(4, 6, 8\)\. "
            r"Give one name per dim\.",
        ),
        (
            lambda x: shard(x, "seq batch embed"),
            r"shard 'seq batch embed': axis 'seq' has size 4 here and size 6 at input x\. Name the "
            r"dims in their order; two different axes need two names\.",
        ),
        (
            lambda x: shard(x, "batch _ heads"),
            r"axis 'heads' .*|",
        ),
        (
            lambda x: as_partial(x * x.detach().new_zeros(()), "batch"),
            r"no sharding rule for new_zeros|",
        ),
        (
            lambda x: as_partial(x, "batch"),
            r"as_partial: float32\[4/dp, 6, 8\] is cut over 'dp'\. shard\(x, \.\.\.\) it whole first\.",
        ),
        (
            lambda x: F.attention(*[x[..., None, None, :]] * 3, scale=x.mean()),
            r"",
        ),
    ],
)
def test_what_a_trace_cannot_hold_is_refused(fn: Callable, text: str) -> None:
    with pytest.raises(ShardingError, match=HERE + text):
        low(fn)


OUTSIDE = torch.ones(8)
