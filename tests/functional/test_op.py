"""How operands and options reach an op."""

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.op import op


@op("... d, d, d -> ... d")
def combine(x: Tensor, a: Tensor, b: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """Return scale * (x * a + b)."""
    return scale * (x * a if b is None else x * a + b)


class Recorder(Tensor):
    """A tensor that notes the call in which it is an operand."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func, args, kwargs


X, A, B = torch.ones(2, 3), torch.full((3,), 2.0), torch.full((3,), 3.0)


def test_operands_may_be_given_by_name() -> None:
    expected = combine(X, A, B, scale=2.0)
    assert torch.equal(combine(X, b=B, a=A, scale=2.0), expected)
    assert torch.equal(combine(b=B, scale=2.0, x=X, a=A), expected)


def test_a_typed_operand_given_by_name_is_seen() -> None:
    """By name it would look like an option, and the op would run untyped."""
    typed = B.as_subclass(Recorder)
    func, args, options = combine(X, A, b=typed, scale=2.0)
    assert func is combine
    assert args[2] is typed
    assert options == {"scale": 2.0}


def test_absent_operands_before_a_named_one_are_none() -> None:
    bias = torch.zeros(3).as_subclass(Recorder)
    _, args, _ = F.layer_norm(X, bias=bias)
    assert args[:2] == (X, None) or (args[0] is X and args[1] is None)
    assert args[2] is bias


def test_a_missing_or_doubled_operand_is_an_error() -> None:
    with pytest.raises(TypeError, match="operand 'a' is missing"):
        combine(X, b=B)
    with pytest.raises(TypeError, match="operand 'x' is given twice"):
        combine(X, A, x=X)
