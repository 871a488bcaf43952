"""Every op on every placement that its rule allows: values and gradients of one device."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.op import op
from megatree.parallel.errors import ShardingError
from megatree.parallel.layout import Layout
from megatree.parallel.lower import trace
from megatree.parallel.mesh import Mesh
from megatree.parallel.ops import RULES
from megatree.parallel.rulecheck import RuleCheck, rulecheck, try_placements
from megatree.parallel.threads import SimulationError
from megatree.parallel.types import S, ShardType
from tests.golden_files import assert_golden
from tests.parallel.rule_cases import (
    NO_OPS,
    RANDOM,
    TORCH,
    UNINITIALISED,
    VOCABULARY,
    Case,
    name_of,
    real,
    whole,
)

REFUSED = {*RANDOM, *UNINITIALISED}
READS = {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__long__}


def check(function: Any, case: Case, **options: Any) -> RuleCheck:
    return rulecheck(
        lambda *xs: case.call(function, *xs),
        *case.operands,
        grad=case.grad,
        rtol=case.rtol,
        **options,
    )


def state(ty: ShardType) -> str:
    """Return the state of a type on the mesh axis "a": S0, S1, I, R or P."""
    cut = [f"S{dim}" for dim, axes in enumerate(ty.spec) if axes]
    return cut[0] if ty.state("a") == S else ty.state("a")


def allowed(placements: Iterable[tuple[ShardType, ...]]) -> str:
    return " ".join(",".join(map(state, placement)) for placement in placements)


def cases() -> Iterator[tuple[str, list[Any], Case]]:
    """Return (name, spellings of the function, case)."""
    spellings: dict[str, list[Any]] = {}
    for function in RULES:
        if function not in READS | {torch.rand}:  # which has the name of Tensor.__rand__
            spellings.setdefault(name_of(function), []).append(function)
    for name, table in TORCH.items():
        yield from ((name, spellings[name], case) for case in table)
    for name, table in VOCABULARY.items():
        yield from ((f"F.{name}", [getattr(F, name)], case) for case in table)


def test_every_op_is_exact_wherever_its_rule_allows_it() -> None:
    """The file is the reference of what every rule allows; one that refuses more moves it too."""
    rows: dict[str, dict[str, set[str]]] = {}
    for name, functions, case in cases():
        try:
            rule = allowed(check(functions[0], case).legal)
        except Exception as error:
            error.add_note(f"in a case of {name}")
            raise
        shapes = ", ".join(str(list(x.shape)) for x in case.operands)
        rows.setdefault(shapes, {}).setdefault(rule, set()).add(name)
    lines = []
    for shapes, by_rule in sorted(rows.items()):
        lines += ["", f"operands {shapes}"]
        for rule, names in sorted(by_rule.items(), key=lambda item: sorted(item[1])):
            lines += [f"  {' '.join(sorted(names))}", f"      {rule}"]
    assert_golden("rules.txt", "Allowed placements on one mesh axis, by op.\n" + "\n".join(lines))


def test_every_spelling_of_an_op_has_the_same_rule() -> None:
    """torch.add, Tensor.add and Tensor.__add__ are three functions to torch."""
    num_spellings = 0
    for name, functions, case in cases():
        if len(functions) == 1:
            continue
        rules = {
            str(f): allowed(p for p, traced in try_all(f, case).items() if traced)
            for f in functions
        }
        assert len(set(rules.values())) == 1, f"{name} {[x.shape for x in case.operands]}: {rules}"
        num_spellings += len(rules)
    assert num_spellings > 400


def try_all(function: Any, case: Case) -> dict[tuple[ShardType, ...], Any]:
    return try_placements(lambda *xs: case.call(function, *xs), case.operands, {"a": 2}, case.grad)


@pytest.mark.full
def test_every_spelling_of_an_op_is_exact() -> None:
    for _, functions, case in cases():
        for function in functions[1:]:
            check(function, case)


def test_no_op_is_without_a_case() -> None:
    names = {name_of(function) for function in RULES}
    assert names - set(TORCH) == REFUSED - {"rand"}  # Tensor.__rand__ is `1 & x`
    assert set(TORCH) - names == set()
    assert set(F.__all__) - NO_OPS == set(VOCABULARY)
    declared = {
        f"{module.__name__}.{name}"
        for module in vars(F).values()
        if inspect.ismodule(module)
        for name, value in vars(module).items()
        if hasattr(value, "rule") and value.rule.name not in F.__all__
    }
    assert declared == set()


@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (lambda x, y: F.einsum("t d, v d -> t v", x, y), (real(4, 4), real(4, 4))),
        (F.embedding, (whole(8, 4), real(8, 4))),
        (F.linear, (real(4, 4), real(4, 4, 4))),
        (F.rms_norm, (real(4, 4), real(4))),
        (lambda x, y: F.cross_entropy(x, y, num_classes=6), (real(4, 8), whole(6, 4))),
        (torch.add, (real(4, 4), real(4, 4))),
        (torch.mul, (real(4, 4), real(4))),
        (torch.where, (real(4, 4) > 0.5, real(4, 4), real(4))),
        (lambda x: x.reshape(4, 2, 4), (real(8, 4),)),
        (lambda x: x.mean(0), (real(4, 4),)),
    ],
    ids=[
        "einsum",
        "embedding",
        "linear",
        "rms_norm",
        "cross_entropy",
        "add",
        "mul",
        "where",
        "reshape",
        "mean",
    ],
)
def test_mesh_axes_are_typed_independently(function: Any, operands: tuple[Tensor, ...]) -> None:
    """Only here two axes meet: on one dim, on two, one summed and one kept, P(a) times P(b)."""
    one, two = (rulecheck(function, *operands, mesh=mesh) for mesh in ({"a": 2}, {"a": 2, "b": 2}))
    assert len(two.legal) == len(one.legal) ** 2


# -- a wrong rule is seen -----------------------------------------------------------------------


@op("t d+ -> t", linear=[[0]])
def right_sum(x: Tensor) -> Tensor:
    return x.sum(-1)


@op("t d! -> t")
def whole_sum(x: Tensor) -> Tensor:
    return x.sum(-1)


def test_right_declarations_pass() -> None:
    assert allowed(rulecheck(right_sum, real(4, 6)).legal) == "S0 S1 I P R"
    assert allowed(rulecheck(whole_sum, real(4, 6)).legal) == "S0 I R"


@op("t d@ -> t")
def summed_label_said_to_be_own(x: Tensor) -> Tensor:
    return x.sum(-1)


@op("t d -> t d")
def whole_label_left_free(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


@op("t d+ -> t", linear=[[0]])
def falsely_linear(x: Tensor) -> Tensor:
    return x.sum(-1).square()


@op("t d+ -> t")
def maximum_said_to_be_a_sum(x: Tensor) -> Tensor:
    return x.amax(-1)


@op("t d, d -> t d", linear=[[0, 1]])
def falsely_joint(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@op("t d@ -> t", comm=True)
def counts_its_gradient_twice(comm: Any, x: Tensor) -> Tensor:
    return comm.psum(x.sum(-1), "d")  # its dual sums once more: the op must write its own backward


@op("t d, d t -> t d")
def labels_in_the_wrong_order(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@pytest.mark.parametrize(
    ("wrong", "operands", "text"),
    [
        (
            summed_label_said_to_be_own,
            (real(4, 6),),
            r"rulecheck: the rule or the op's local form is wrong: with operands "
            r"\(float64\[4, 6/a\]\) this happens: result 0: .* the copy at \(1,\) differs from",
        ),
        (whole_label_left_free, (real(4, 6),), r"float64\[4, 6/a\].*the result 0 is off by"),
        (falsely_linear, (real(4, 6),), r"float64\[4, 6/a\]\) the result 0 is off by"),
        (maximum_said_to_be_a_sum, (real(4, 6),), r"float64\[4, 6/a\].*the result 0 is off by"),
        (falsely_joint, (real(4, 6), real(6)), r"P\(a\), float64\[6\] P\(a\)\) this happens"),
        (counts_its_gradient_twice, (real(4, 6),), r"the gradient of operand 0 is off by 1 "),
        (labels_in_the_wrong_order, (real(4, 4), real(4, 4)), r"size of tensor a \(4\) must match"),
    ],
)
def test_a_wrong_declaration_is_caught(wrong: Any, operands: tuple, text: str) -> None:
    with pytest.raises(SimulationError, match=text):
        rulecheck(wrong, *operands)


def test_an_unmarked_label_that_vanishes_is_refused_at_once() -> None:
    @op("t d -> t")
    def unmarked(x: Tensor) -> Tensor:
        return x.sum(-1)

    with pytest.raises(
        ShardingError, match=r"unmarked: 't d -> t': d vanishes\. Mark it \+ \(summed\)"
    ):
        lower_one(unmarked, real(4, 6))


def test_a_label_in_some_outputs_only_may_not_be_cut() -> None:
    """It once came out as I: a rank's own sum passed for the whole one."""

    @op("t d -> t d, t")
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.sum(-1)

    assert allowed(rulecheck(both, real(4, 6)).legal) == "S0 I R"


def test_a_rule_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(SimulationError, match=r"rulecheck: the rule allows none of 5 placements"):
        rulecheck(lambda x: x.nonzero(), real(4, 6))


# -- functions that have no rule on purpose -----------------------------------------------------


def lower_one(fn: Any, x: Tensor, spec: tuple = ((), ())) -> None:
    ty = ShardType(tuple(x.shape), x.dtype, spec, (("a", "I"),), grad=True)
    trace(fn, Layout(Mesh(a=2)), ty)


DRAWS = {
    "randint": lambda f, x: f(5, (4, 6)),
    "randperm": lambda f, x: f(6),
    "randint_like": lambda f, x: f(x, 5),
    "multinomial": lambda f, x: f(x, 2),
    "dropout": lambda f, x: f(x, 0.5, True),
    "alpha_dropout": lambda f, x: f(x, 0.5, True),
    "feature_dropout": lambda f, x: f(x, 0.5, True),
    "rand": lambda f, x: f(4, 6),
    "randn": lambda f, x: f(4, 6),
}


def test_random_state_is_refused() -> None:
    functions = [f for f in RULES if name_of(f) in RANDOM and f is not Tensor.__rand__]
    for function in functions:
        draw = DRAWS.get(name_of(function), lambda f, x: f(x))
        with pytest.raises(
            ShardingError, match=r"draws from torch's random state, which differs by"
        ):
            lower_one(lambda x, draw=draw, f=function: x + draw(f, x), real(4, 6))
    assert len(functions) >= 15


@pytest.mark.parametrize("function", [torch.empty, torch.empty_like])
def test_uninitialised_memory_is_refused(function: Any) -> None:
    with pytest.raises(ShardingError, match=r"holds what the rank's memory held"):
        lower_one(
            lambda x: x + function(4, 6) if function is torch.empty else function(x), real(4, 6)
        )


@pytest.mark.parametrize("function", sorted(READS, key=str), ids=str)
def test_conversions_to_python_are_refused(function: Any) -> None:
    with pytest.raises(ShardingError, match=r"a value \(.*\) flows into Python here"):
        lower_one(lambda x: function(x.sum()), real(4, 6))
