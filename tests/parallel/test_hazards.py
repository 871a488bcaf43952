"""What would silently go wrong in a trace: each an error that names the line and the fix."""

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
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
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
    return x if x.isnan() else -x


def attribute(x: Tensor) -> Tensor:
    x.data = x * 2
    return x


PYTHON = (
    r"a value flows into Python here, where every rank has only its part\. Use torch\.where or a"
)
IN_PLACE = r"an in-place write to a typed tensor\. Write the out-of-place form"


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (
            lambda x: Double.apply(x),
            r"mul: a torch\.autograd\.Function is applied to a typed tensor; its own backward "
            r"would "
            r"be lost\. Declare the function that applies it with @op\(",
        ),
        (
            under(torch.no_grad),
            r"mul: a context of no_grad is active, which a lowered program does not keep\. "
            r"Use F\.stop_gradient on the value\.",
        ),
        (under(torch.inference_mode), r"mul: a context of no_grad is active"),
        (
            under(lambda: torch.autocast("cpu", torch.bfloat16)),
            r"mul: a context of autocast is active, .* Cast with F\.cast, or give parameters a "
            r"dtype\.",
        ),
        (
            under(lambda: sdpa_kernel(SDPBackend.MATH)),
            r"mul: a context of sdpa_kernel is active, .* Choose the kernel with F\.attention\(",
        ),
        (
            lambda x: x + OUTSIDE,
            r"add: mixes a plain tensor \[8\] with a typed one \(float32\[4/dp, 6, 8\]\); whether "
            r"it "
            r"is whole or a shard cannot be known\. Pass it as an input, or make it inside",
        ),
        (lambda x: x * x.sum().item(), "item: " + PYTHON),
        (branch, "bool: " + PYTHON),
        (lambda x: x.tolist(), "tolist: " + PYTHON),
        (lambda x: x[int(x.sum())], "int: " + PYTHON),
        (lambda x: list(x), r"unbind: operand 0 \(.*\) is cut on dim 0"),
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
        (
            lambda x: x[[0, 1]],
            r"indexing float32\[4/dp, 6, 8\] with a tensor or list has no sharding",
        ),
        (lambda x: x[x > 0], r"indexing float32\[4/dp, 6, 8\] with a tensor or list"),
        (
            lambda x: torch.func.grad(lambda y: (y * y).sum())(x),
            r"mul\.default: a torch\.func transform \(grad, vmap, jvp\) is applied to a typed "
            r"tensor",
        ),
        (lambda x: torch.func.vmap(lambda y: y * 2)(x), r"mul\.default: a torch\.func transform"),
        (
            lambda x: x.transpose(0, 1).flatten(0, 1),
            r"flatten float32\[6, 4/dp, 8\] -> \[24, 8\]: dim 1 is cut over \('dp',\) and merged "
            r"behind another dim, so shards would interleave\. Put the cut dim first in its group, "
            r"or keep the dims apart\.",
        ),
        (
            lambda x: x.unflatten(0, (1, 4)).unflatten(1, (1, 4)).flatten(0, 2).view(4, 48)[:2],
            r"getitem: operand 0 \(float32\[4/dp, 48\]\) is cut on dim 0 over \('dp',\), and the "
            r"op "
            r"needs that dim whole\. Insert shard\(x, \.\.\.\) with a whole axis there\.",
        ),
        (
            lambda x: torch.softmax(x, 0),
            r"softmax: operand 0 \(float32\[4/dp, 6, 8\]\) is cut on dim 0 over \('dp',\), and the "
            r"op "
            r"needs that dim whole\.",
        ),
        (
            lambda x: x.reshape(-1).view(torch.int32),
            r"view: reads the bytes of float32\[192/dp\] as torch\.int32, which has no sharding "
            r"rule",
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
            lambda x: as_partial(x, "batch"),
            r"as_partial: float32\[4/dp, 6, 8\] is cut over 'dp'\. shard\(x, \.\.\.\) it whole "
            r"first\.",
        ),
        (
            lambda x: F.attention(*[x[..., None, None]] * 3, scale=x.mean()),
            r"attention: option 'scale' is a tensor, and options are static\. Make it an operand",
        ),
        (
            lambda x: torch.einsum("btd,btd", x, x),
            r"einsum 'btd,btd': 2 operands, and the output must be written out\.",
        ),
        (
            lambda x: torch.einsum("...d,...d->...", x, x.sum(1)),
            r"einsum '\.\.\.d,\.\.\.d->\.\.\.': operands have \[3, 2\] dims\. Give every dim a "
            r"label",
        ),
        (
            lambda x: F.linear(x, x),
            r"linear: mesh axis 'dp' cuts two dims of the op, '0' and 'n0' .*Map one of the two",
        ),
    ],
)
def test_what_a_trace_cannot_hold_is_refused(fn: Callable, text: str) -> None:
    with pytest.raises(ShardingError, match=HERE + text):
        low(fn)


# -- pending sums -------------------------------------------------------------------------------

SUM = r"The sum was created at parallel/test_hazards\.py:\d+ \(einsum 'b t f, f d -> b t d'\)\. "
NOT_LINEAR = (
    r"operand {} \(float32\[4/dp, 6, 8\] P\(tp\)\) is a pending sum over mesh axis 'tp', and the "
    r"op "
    r"is not linear in it here\. "
    + SUM
    + r"Insert shard\(x, \.\.\.\) between the two, so that the "
    r"sum is finished\."
)


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda h, w, b: product(h, w) + b, "add: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: b - product(h, w), "sub: " + NOT_LINEAR.format(1)),
        (lambda h, w, b: product(h, w) + 1, "add: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: torch.add(product(h, w), other=1), "add: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: 1 - product(h, w), "rsub: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: product(h, w) * product(h, w), "mul: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: product(h, w).square(), "square: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: torch.softmax(product(h, w), -1), "softmax: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: F.rms_norm(product(h, w), b), "rms_norm: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: b / product(h, w), "div: " + NOT_LINEAR.format(1)),
        (lambda h, w, b: 1 / product(h, w), "(rdiv|reciprocal): " + NOT_LINEAR.format(0)),
        (
            lambda h, w, b: torch.div(product(h, w), 2, rounding_mode="floor"),
            "div: " + NOT_LINEAR.format(0),
        ),
        (lambda h, w, b: product(h, w).long(), "long: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: product(h, w).to(torch.int64), "to: " + NOT_LINEAR.format(0)),
        (lambda h, w, b: product(h, w) > 0, "gt: " + NOT_LINEAR.format(0)),
        (
            lambda h, w, b: torch.where(b > 0, product(h, w), 1.0),
            "where: " + NOT_LINEAR.format(1),
        ),
        (
            lambda h, w, b: torch.cat([product(h, w), shard(product(h, w), "batch seq embed")]),
            r"cat: operand 0 .*is cut on dim 0|cat: " + NOT_LINEAR.format(0),
        ),
        (
            lambda h, w, b: F.linear(product(h, w), w),
            r"linear: operand 0 \(float32\[4/dp, 6, 8\] P\(tp\)\) is a pending sum over mesh axis "
            r"'tp', which cuts 'n0' of another operand\. "
            + SUM
            + r"Insert shard\(x, \.\.\.\) where the sum is made\.",
        ),
        (
            lambda h, w, b: torch.nn.functional.linear(h, w.t(), b),
            r"linear: the contracted dim of float32\[4/dp, 6, 12/tp\] is cut over \('tp',\), so "
            r"the "
            r"product is a pending sum and the bias would be added once per rank\. "
            r"Add the bias after shard\(product, \.\.\.\)\.",
        ),
    ],
)
def test_a_pending_sum_is_never_discharged_silently(fn: Callable, text: str) -> None:
    with pytest.raises(ShardingError, match=HERE + text):
        low(fn, H, DOWN, Param("embed"))


def test_the_error_names_the_line_that_made_the_sum_and_the_line_that_used_it() -> None:
    def fn(h: Tensor, w: Tensor) -> Tensor:
        y = F.einsum("b t f, f d -> b t d", h, w)
        y = y * 2
        return y.exp()

    first = fn.__code__.co_firstlineno
    with pytest.raises(ShardingError) as caught:
        low(fn, H, DOWN)
    message = str(caught.value)
    assert message.startswith(f"parallel/test_hazards.py:{first + 3}: exp: ")
    assert f"created at parallel/test_hazards.py:{first + 1} (einsum" in message


def test_operands_must_agree_on_a_dim() -> None:
    with pytest.raises(
        ShardingError,
        match=HERE
        + r"mul: dim '2' is cut over \('tp',\) in operand 0 \(float32\[4/dp, 6, 12/tp\]\) "
        r"and over nothing in operand 1 \(float32\[12\]\)\. Lay both out alike with shard\(x, "
        r"\.\.\.\) "
        r"or in rules\.",
    ):
        low(lambda h: h * torch.arange(12.0), H)


def test_a_mean_divides_by_the_global_count_and_local_counts_are_refused() -> None:
    """Section 7, row 2: a quotient of two sums would be the mean of one rank's tokens."""
    low(lambda x: x.mean())
    with pytest.raises(
        ShardingError, match=HERE + r"div: operand 0 \(float32\[\] P\(dp\)\) is a pending"
    ):
        low(lambda x: x.sum() / torch.ones_like(x).sum())


# -- the borders of a trace ---------------------------------------------------------------------


def test_a_typed_tensor_is_useless_after_its_trace() -> None:
    kept = []
    low(lambda x: (kept.append(x), x)[1])
    with pytest.raises(
        ShardingError,
        match=HERE
        + r"mul: a typed tensor is used outside the trace it belongs to \(a body that closes "
        r"over it, or code after the trace\)\. Pass it as an operand\.",
    ):
        kept[0] * 2


def test_a_typed_tensor_of_another_trace_is_refused() -> None:
    kept = []
    low(lambda x: (kept.append(x), x)[1])
    with pytest.raises(
        ShardingError, match=HERE + r"add: a typed tensor is used outside the trace"
    ):
        low(lambda x: x + kept[0])


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda x: (x, 1.0), r"<lambda>: returns 1\.0, which does not follow from its"),
        (
            lambda x: OUTSIDE,
            r"<lambda>: returns a plain tensor \[8\], which does not follow from its inputs\. "
            r"Return values computed from the arguments\.",
        ),
    ],
)  # fmt: skip
def test_a_result_that_no_input_made_is_refused(result: Callable, text: str) -> None:
    with pytest.raises(ShardingError, match=text):
        low(result)


def test_metadata_is_that_of_the_whole_value() -> None:
    seen = {}

    def fn(x: Tensor) -> Tensor:
        seen.update(shape=tuple(x.shape), len=len(x), dim=x.dim(), dtype=x.dtype, n=x.numel())
        seen.update(text=f"{x}", kind=x.is_floating_point(), size=x.size(0))
        return x

    low(fn)
    assert seen == {
        "shape": (4, 6, 8), "len": 4, "dim": 3, "dtype": torch.float32, "n": 192, "size": 4,
        "kind": True, "text": "TypedTensor(float32[4/dp, 6, 8])",
    }  # fmt: skip


def test_the_error_is_no_type_error() -> None:
    """Python swallows a TypeError inside __add__ and tries the reflected operation."""
    assert not issubclass(ShardingError, TypeError)
    with contextlib.suppress(ShardingError):
        low(lambda x: x.__add__(OUTSIDE))


def test_an_autograd_function_inside_an_op_keeps_its_backward() -> None:
    """The fix that the message names."""

    @op("... -> ...")
    def double(x: Tensor) -> Tensor:
        return Double.apply(x)

    low(lambda x: double(x))


# -- reshapes and indices that look local -------------------------------------------------------


def test_a_squeezed_shard_of_size_one_stays() -> None:
    """A shard of size 1 of a dim of size 2 is squeezed by torch.squeeze(x) on the local tensor."""
    program = lower(
        lambda x: x.squeeze() * 1, Layout(Mesh(dp=2), Rules(batch="dp")),
        Array("batch one embed", shape=(2, 1, 8)),
    )  # fmt: skip
    assert program.out_types[0].shape == (2, 8)
    assert program.out_types[0].spec == (("dp",), ())


OUTSIDE = torch.ones(8)
