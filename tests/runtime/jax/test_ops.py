"""Every op's JAX form against torch: values, dtypes and gradients, in every spelling."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.op import op
from megatree.parallel.errors import ShardingError
from megatree.runtime.jax import forms
from megatree.runtime.jax.to_jax import to_jax
from tests.parallel.rule_cases import Case, real
from tests.runtime.jax.compare import array, differences, in_torch
from tests.runtime.jax.op_cases import call, cases
from tests.tolerances import RELATIVE

EXACT = RELATIVE[torch.float64]


def wrong(named: Iterable[tuple[str, Any, Case]], **options: Any) -> list[str]:
    """Return what differs between torch and JAX in some calls."""
    named = list(named)
    names = [name for name, _, _ in named]
    calls = [
        in_torch(partial(call, function, case), case.operands, grad=case.grad)
        for _, function, case in named
    ]
    texts = []
    for (name, _, case), found in zip(named, differences(calls, names, **options), strict=True):
        allowed = EXACT if case.rtol < 1e-8 else case.rtol  # casts have tolerances of their own
        texts += [f"{name}: {what} {error:.3g}" for what, error in found.items() if error > allowed]
    return texts


def alone(fn: Any, operands: tuple[Tensor, ...], **options: Any) -> dict[str, float]:
    return differences([in_torch(fn, operands)], **options)[0]


def test_every_op_has_a_jax_form_that_agrees_with_torch() -> None:
    """To 1e-12 in float64, gradients included, and with torch's dtypes and shapes."""
    first = [(name, functions[0], case) for name, functions, case in cases()]
    assert not wrong(first)
    assert len(first) > 200


def test_every_spelling_of_an_op_runs_the_same_form() -> None:
    """torch.add, Tensor.add and Tensor.__add__ are three functions to torch."""
    num_spellings = 0
    for name, functions, case in cases():
        arrays = list(map(array, case.operands))
        programs = set()
        for function in functions:
            run = to_jax(partial(call, function, case))
            programs.add(str(jax.make_jaxpr(run)(*arrays)))
            num_spellings += 1
        assert len(programs) == 1, f"{name}: {programs}"
    assert num_spellings > 500


@pytest.mark.full
def test_every_spelling_of_an_op_agrees_with_torch() -> None:
    others = [(name, f, case) for name, functions, case in cases() for f in functions[1:]]
    assert not wrong(others)
    assert len(others) > 250


# -- a check must be able to fail ---------------------------------------------------------------


ATTENTION: Any = F.attention


def _wrong_attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
    """Forget the scale."""
    return forms.FORMS[ATTENTION.rule.fn](q, k, v, *rest, **{**options, "scale": 1.0})


def _wrong_gradient(x: Any) -> Any:
    """Return the right value with a gradient of the sigmoid alone."""
    y = x * jax.nn.sigmoid(x)
    z = jax.nn.sigmoid(x)
    return z + jax.lax.stop_gradient(y - z)


@pytest.mark.parametrize(
    ("name", "function", "form", "what"),
    [
        ("F.attention", F.attention, _wrong_attention, "result 0"),
        ("F.silu", F.silu, _wrong_gradient, "gradient 0"),
        ("F.cross_entropy", F.cross_entropy, lambda x, y, **_: jnp.sum(x, -1), "result 0"),
        ("softmax", torch.softmax, lambda x, dim: jax.nn.softmax(x, 0), "result 0"),
    ],
)
def test_a_wrong_form_is_seen(name: str, function: Any, form: Any, what: str) -> None:
    case = next(case for other, _, case in cases() if other == name)
    found = wrong([(name, function, case)], forms={function: form})
    assert found
    assert found[0].startswith(f"{name}: {what}")


# -- ops without a form -------------------------------------------------------------------------


def test_a_torch_function_without_a_form_is_named_with_its_line(monkeypatch: Any) -> None:
    left = {f: g for f, g in forms.FORMS.items() if f is not torch.tanh}
    monkeypatch.setattr("megatree.runtime.jax.interpret.FORMS", left)
    with pytest.raises(
        ShardingError,
        match=r"jax/test_ops\.py:\d+: tanh: this torch function has no JAX form\. Give",
    ):
        to_jax(lambda x: torch.tanh(x))(jnp.ones(3))
    assert to_jax(torch.tanh, forms={torch.tanh: jnp.tanh})(jnp.ones(3)).shape == (3,)


@op(lambda ranks: f"... d!{', d!' * (len(ranks) - 1)} -> ... d!, ...")
def own_op(x: Tensor, w: Tensor | None = None, *, power: int = 2) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x) ** power
    y = y if w is None else y * w
    return y, y.sum(-1)


def test_an_op_of_ones_own_runs_the_torch_functions_of_its_body() -> None:
    found = alone(lambda x, w: own_op(x, w, power=3), (real(4, 6), real(6)))
    assert max(found.values()) < EXACT
    assert len(found) == 4
    assert max(alone(lambda x: own_op(x, None), (real(4, 6),)).values()) < EXACT


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * g


@op("... -> ...")
def opaque(x: Tensor) -> Tensor:
    return _Square.apply(x)


def test_an_op_whose_body_cannot_be_traced_asks_for_a_form() -> None:
    with pytest.raises(
        ShardingError,
        match=r"test_ops\.py:\d+: opaque: has no JAX form, and its body cannot be traced: .*"
        r"a torch\.autograd\.Function is applied.* Or give a form: to_jax\(fn, forms=\{function:",
    ):
        to_jax(lambda x: opaque(x))(jnp.ones(3))
    found = alone(lambda x: opaque(x) + 1, (real(4),), forms={opaque: jnp.square})
    assert max(found.values()) < EXACT
