"""What would silently go wrong in a trace: each an error that names the line and the fix.

The commonest of them stand in `test_gallery.py`, word for word.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.annotate import shard
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


def augmented(x: Tensor) -> Tensor:
    x += 1.0
    return x


def branch(x: Tensor) -> Tensor:
    return x if x.isnan() else -x


def attribute(x: Tensor) -> Tensor:
    x.data = x * 2
    return x


PYTHON = r"a value \(.*\) flows into Python here, where every rank has only its part\. Use torch\."
IN_PLACE = r"an in-place write to a typed tensor \(.*\)\. Write the out-of-place form"


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (under(torch.inference_mode), r"mul: a context of no_grad is active"),
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
        (lambda x: torch.nn.functional.dropout(x), "dropout draws from torch's random state"),
        (lambda x: x.to(torch.device("cpu")), r"to: moves a typed tensor \(.*\) to a device"),
        (lambda x: x.cpu(), r"cpu: moves a typed tensor \(.*\) to a device"),
        (lambda x: x.grad, "no sharding rule for grad "),
        (lambda x: torch.where(x > 0), r"where\(condition\): the result's shape depends on data"),
        (
            lambda x: x[[0, 1]],
            r"indexing float32\[4/dp, 6, 8\] with a tensor or list has no sharding",
        ),
        (lambda x: torch.func.vmap(lambda y: y * 2)(x), r"mul\.default: a torch\.func transform"),
        (
            lambda x: x.unflatten(0, (1, 4)).unflatten(1, (1, 4)).flatten(0, 2).view(4, 48)[:2],
            r"getitem: operand 0 \(float32\[4/dp, 48\]\) is cut on dim 0 over \('dp',\), and the "
            r"op "
            r"needs that dim whole\. Insert shard\(x, \.\.\.\) with a whole axis there\.",
        ),
        (
            lambda x: x.reshape(-1).view(torch.int32),
            r"view: reads the bytes of float32\[192/dp\] as torch\.int32, which has no sharding "
            r"rule",
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
        (lambda h, w, b: product(h, w).square(), "square: " + NOT_LINEAR.format(0)),
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


def test_a_mean_divides_by_the_global_count_and_local_counts_are_refused() -> None:
    """Section 7, row 2: a quotient of two sums would be the mean of one rank's tokens."""
    low(lambda x: x.mean())
    with pytest.raises(
        ShardingError, match=HERE + r"div: operand 0 \(float32\[\] P\(dp\)\) is a pending"
    ):
        low(lambda x: x.sum() / torch.ones_like(x).sum())


# -- the borders of a trace ---------------------------------------------------------------------


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
