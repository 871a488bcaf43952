"""Operands on which `rulecheck` tries every op: the torch functions of the rule tables, and F."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F

_random = torch.Generator().manual_seed(1)


def real(*shape: int) -> Tensor:
    """Draw numbers in (0.1, 0.9), where every function of the tables is smooth."""
    return 0.1 + 0.8 * torch.rand(*shape, dtype=torch.float64, generator=_random)


def whole(high: int, *shape: int) -> Tensor:
    """Draw integers from 0 to high - 1."""
    return torch.randint(high, shape, generator=_random)


def truth(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_random) > 0.5


@dataclass(frozen=True)
class Case:
    """A call to check.

    Args:
        call: called with (function, *operands).
        operands: whole tensors.
        rtol: relative L2 distance allowed.
        grad: whether the function has a gradient.
    """

    call: Callable[..., Any]
    operands: tuple[Tensor, ...]
    rtol: float = 1e-10
    grad: bool = True


def plain(*operands: Tensor, rtol: float = 1e-10, grad: bool = True) -> Case:
    """Call a function of its operands alone."""
    return Case(lambda f, *xs: f(*xs), operands, rtol, grad)


def called(call: Callable[..., Any], *operands: Tensor, rtol: float = 1e-10) -> Case:
    return Case(call, operands, rtol)


X, Y, ROW, COLUMN = real(4, 6), real(4, 6), real(6), real(4, 1)
SQUARE = real(4, 4)
NUMBERS, OTHERS, FLAGS, MORE_FLAGS = whole(5, 4, 6), 1 + whole(3, 4, 6), truth(4, 6), truth(4, 6)


def _same(names: str, *cases: Case) -> dict[str, list[Case]]:
    return {name: list(cases) for name in names.split()}


def _along(f: Any, x: Tensor) -> Any:
    return f(x, -1)


def _pair(f: Any, x: Tensor) -> Any:
    return tuple(f(x, dim=1))


TORCH: dict[str, list[Case]] = {
    # -- pointwise
    **_same(
        """abs acos asin atan ceil cos cosh elu erf erfc exp exp2 expm1 floor gelu hardtanh isfinite
        isinf isnan isneginf isposinf leaky_relu log log10 log1p log2 logit log_sigmoid nan_to_num
        neg negative positive reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin sinh
        softplus sqrt square tan tanh trunc""",
        plain(X),
    ),
    **_same("clone contiguous real detach", plain(X)),
    **_same("zeros_like ones_like", plain(X)),
    "full_like": [called(lambda f, x: f(x, 2.0), X)],
    **_same("float", plain(X, rtol=1e-6)),
    **_same("half", plain(X, rtol=5e-3)),
    **_same("bfloat16", plain(X, rtol=5e-2)),
    **_same("double int long short bool", plain(X)),
    "to": [
        called(lambda f, x: f(x, torch.float32), X, rtol=1e-6),
        called(lambda f, x: f(x, torch.int64), X),
        called(lambda f, x, y: f(x, y), X, NUMBERS),
    ],
    "type": [called(lambda f, x: f(x, torch.float32), X, rtol=1e-6)],
    "type_as": [called(lambda f, x, y: f(x, y), X, NUMBERS)],
    **_same("clamp_min clamp_max", called(lambda f, x: f(x, 0.5), X)),
    "clamp": [
        called(lambda f, x: f(x, 0.3, 0.7), X),
        called(lambda f, x, y: f(x, min=y), X, ROW),
    ],
    **_same(
        """atan2 eq fmod ge gt le logaddexp lt maximum minimum mod ne remainder rmod rpow xlogy""",
        plain(X, Y),
    ),
    **_same("floor_divide floordiv heaviside rfloordiv", plain(X, Y, grad=False)),
    "pow": [plain(X, Y), called(lambda f, x: f(x, 2), X)],
    **_same("logical_and logical_or logical_xor", plain(FLAGS, MORE_FLAGS)),
    **_same("logical_not invert bitwise_not", plain(FLAGS)),
    **_same("bitwise_and bitwise_or bitwise_xor and or xor rand ror rxor", plain(NUMBERS, OTHERS)),
    **_same(
        "bitwise_left_shift bitwise_right_shift lshift rshift rlshift rrshift",
        plain(OTHERS, NUMBERS),
    ),
    **_same(
        "add sub subtract radd rsub",
        plain(X, Y),
        plain(X, ROW),
        plain(ROW, X),
        plain(X, COLUMN),
        plain(X, X[:1]),
        called(lambda f, x: f(x, 2.0), X),
        called(lambda f, x: f(x, 0), X),
    ),
    **_same("mul multiply rmul", plain(X, Y), plain(X, ROW), called(lambda f, x: f(x, 2.0), X)),
    **_same(
        "div divide true_divide truediv",
        plain(X, Y),
        plain(X, COLUMN),
        called(lambda f, x: f(x, 2.0), X),
    ),
    "rdiv": [plain(X, Y), called(lambda f, x: f(x, 2.0), X)],
    "where": [
        called(lambda f, c, x, y: _choose(f, c, x, y), FLAGS, X, Y),
        called(lambda f, c, x: _choose(f, c, x, 0.0), FLAGS, X),
        called(lambda f, c, x: _choose(f, c, x, 1.0), FLAGS, X),
        called(lambda f, c, x, y: _choose(f, c, x, y), FLAGS[:, :1], X, ROW),
    ],
    "masked_fill": [
        called(lambda f, x, m: f(x, m, 0.0), X, FLAGS),
        called(lambda f, x, m: f(x, m, 1.0), X, FLAGS),
    ],
    # -- contractions
    "einsum": [
        called(lambda f, x, y: f("td,vd->tv", x, y), X, real(8, 6)),
        called(lambda f, x, y: f("...d,vd->...v", x, y), real(2, 4, 6), real(8, 6)),
        called(lambda f, x, y: f("td,td->td", x, y), X, Y),
        called(lambda f, x: f("td->d", x), X),
        called(lambda f, x: f("td->dt", x), X),
        called(lambda f, x, y, z: f("t,td,d->", x, y, z), real(4), X, ROW),
    ],
    **_same("matmul rmatmul", plain(SQUARE, real(4, 4)), plain(real(2, 4, 4), SQUARE)),
    "mm": [plain(X, real(6, 2))],
    "bmm": [plain(real(2, 4, 6), real(2, 6, 2))],
    "mv": [plain(X, ROW)],
    "dot": [plain(ROW, real(6))],
    "outer": [plain(ROW, real(4))],
    "linear": [
        plain(X, real(8, 6)),
        plain(X, real(8, 6), real(8)),
        plain(real(2, 4, 6), real(2, 6)),
    ],
    # -- reductions
    **_same(
        "sum mean",
        plain(X),
        called(lambda f, x: f(x, 0), X),
        called(lambda f, x: f(x, dim=(0, 1), keepdim=True), X),
        called(lambda f, x: f(x, axis=-1, keepdims=True), X),
    ),
    **_same("amax amin", plain(X), called(lambda f, x: f(x, (1,), True), X)),
    **_same("max min", plain(X), called(_pair, X), plain(X, Y)),
    **_same("argmax argmin", plain(X), called(_along, X)),
    **_same("all any", plain(FLAGS), called(_along, FLAGS)),
    **_same("prod count_nonzero", plain(X), called(_along, X)),
    "logsumexp": [called(_along, X)],
    **_same("softmax log_softmax cumsum cumprod logcumsumexp", called(_along, X)),
    **_same("sort", called(_pair, X), called(lambda f, x: tuple(f(x)), X)),
    "argsort": [plain(X), called(lambda f, x: f(x, 0), X)],
    "topk": [called(lambda f, x: tuple(f(x, 2, dim=0)), X)],
    "flip": [called(lambda f, x: f(x, (0,)), X), called(lambda f, x: f(x, dims=(0, 1)), X)],
    **_same("tril triu", plain(real(2, 4, 4)), called(lambda f, x: f(x, 1), real(2, 4, 4))),
    **_same(
        "layer_norm",
        called(lambda f, x: f(x, (6,)), X),
        called(lambda f, x, w: f(x, (6,), w), X, ROW),
        called(lambda f, x, w, b: f(x, (6,), weight=w, bias=b), X, ROW, real(6)),
    ),
    "rms_norm": [called(lambda f, x, w: f(x, (6,), w), X, ROW)],
    # -- shapes
    **_same(
        "reshape view",
        called(lambda f, x: f(x, (24,)), X),
        called(lambda f, x: f(x, (2, 2, 6)), X),
        called(lambda f, x: f(x, (4, 2, 3)), X),
        called(lambda f, x: f(x, (1, 8, 3)), X),
    ),
    "flatten": [plain(X), called(lambda f, x: f(x, 1), real(2, 4, 6))],
    "ravel": [plain(X)],
    "unflatten": [called(lambda f, x: f(x, 1, (2, 3)), X)],
    **_same("view_as reshape_as", plain(X, real(2, 2, 6))),
    **_same("transpose swapaxes swapdims", called(lambda f, x: f(x, 0, 1), real(2, 4, 6))),
    "permute": [called(lambda f, x: f(x, (2, 0, 1)), real(2, 4, 6))],
    **_same("movedim moveaxis", called(lambda f, x: f(x, 0, -1), real(2, 4, 6))),
    **_same("t T mT adjoint", plain(X)),
    "unsqueeze": [called(lambda f, x: f(x, 0), X), called(_along, X)],
    "squeeze": [plain(real(4, 1, 6)), called(lambda f, x: f(x, 1), real(4, 1, 6))],
    **_same(
        "expand broadcast_to",
        called(lambda f, x: f(x, (2, 4, 6)), X),
        called(lambda f, x: f(x, (4, 6)), COLUMN),
    ),
    "expand_as": [plain(COLUMN, X)],
    **_same(
        "cat concat concatenate",
        called(lambda f, x, y: f([x, y]), X, Y),
        called(lambda f, x, y: f([x, y], axis=1), X, Y),
    ),
    "stack": [
        called(lambda f, x, y: f([x, y]), X, Y),
        called(lambda f, x, y: f([x, y], axis=1), X, Y),
    ],
    "chunk": [called(lambda f, x: tuple(f(x, 2, 1)), X)],
    "split": [
        called(lambda f, x: tuple(f(x, 2)), X),
        called(lambda f, x: tuple(f(x, [2, 4], 1)), X),
    ],
    "tensor_split": [called(lambda f, x: tuple(f(x, 3, dim=1)), X)],
    "unbind": [plain(X), called(lambda f, x: tuple(f(x, 1)), X)],
    "narrow": [called(lambda f, x: f(x, 1, 2, 3), X)],
    "select": [called(lambda f, x: f(x, 0, 1), X)],
    "getitem": [
        called(lambda f, x: f(x, (slice(None), slice(1, 3))), X),
        called(lambda f, x: f(x, (Ellipsis, None, 2)), X),
        called(lambda f, x: f(x, (slice(0, 4), slice(None, None, 2))), X),
        called(lambda f, x: f(x, None), X),
    ],
    "gather": [
        called(lambda f, x, i: f(x, 1, i), X, whole(6, 4, 3)),
        called(lambda f, x, i: f(x, 1, i), X, whole(6, 2, 6)),
    ],
    "take_along_dim": [called(lambda f, x, i: f(x, i, 0), X, whole(4, 2, 6))],
    # -- factories
    "arange": [
        called(lambda f, x: x * f(6, dtype=torch.float64), X),
        called(lambda f, n: n + f(1, 13, 2), NUMBERS),
    ],
    **_same("zeros ones", called(lambda f, x: x + f(4, 6), X)),
    "full": [called(lambda f, x: x * f((6,), 3.0), X)],
    "eye": [called(lambda f, x: x @ f(6, dtype=torch.float64), X)],
    "linspace": [called(lambda f, x: x * f(0, 1, 6), X)],
    "tensor": [called(lambda f, x: x * f([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), X)],
    "scalar_tensor": [called(lambda f, x: x * f(3.0), X)],
    "tril_indices": [called(lambda f, n: n[:, :1] + f(4, 4)[0, :1], NUMBERS)],
}
"""Name of a torch function -> its calls, for all spellings (torch.add, Tensor.__add__)."""

RANDOM = [
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "rand_like",
    "randn_like",
    "randint_like",
    "bernoulli",
    "multinomial",
    "dropout",
    "alpha_dropout",
    "feature_dropout",
]
UNINITIALISED = ["empty", "empty_like"]


def _choose(f: Any, c: Any, x: Any, y: Any) -> Any:
    return f(x, c, y) if f is Tensor.where else f(c, x, y)


KEY = torch.tensor(7)
Q, K, V = real(2, 4, 2, 2, 4), real(2, 4, 2, 4), real(2, 4, 2, 6)
PLACES = torch.tensor([2, 0, 1, 3])
DOCUMENTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
TABLE = F.rope_table(PLACES, 4, dtype=torch.float64)

VOCABULARY: dict[str, list[Case]] = {
    **_same("silu gelu gelu_tanh squared_relu", plain(X)),
    "swiglu": [plain(X, Y)],
    "shard": [called(lambda f, x: f(x, "_ _"), X)],
    "as_partial": [called(lambda f, x: f(x, "heads"), X)],
    "cast": [called(lambda f, x: f(x, torch.float32), X, rtol=1e-6)],
    "stop_gradient": [plain(X)],
    "einsum": [called(lambda f, x, y: f("t d, v d -> t v", x, y), X, real(8, 6))],
    "linear": [plain(X, real(8, 6)), plain(X, real(2, 4, 6)), plain(X, ROW)],
    "project": [called(lambda f, x, a, b: f(x, (a, b)), X, real(8, 6), real(2, 4, 6))],
    "dropout": [called(lambda f, x, k: f(x, k, rate=0.4), X, KEY)],
    "jitter": [called(lambda f, x, k: f(x, k, rate=0.4), X, KEY)],
    "ahead": [called(lambda f, x: f(x, by=2, fill=0), whole(8, 2, 4, 6))],
    "beside": [plain(real(2, 4, 6, 2), real(2, 4, 4))],
    "embedding": [plain(whole(8, 4), real(8, 6)), plain(whole(8, 2, 4), real(8, 6))],
    "fold": [called(lambda f, k, n: f(k, "layer", n), KEY, torch.tensor(3))],
    "cross_entropy": [
        plain(real(4, 8), whole(8, 4)),
        called(lambda f, x, y: f(x, y, num_classes=5), real(2, 4, 8), whole(5, 2, 4)),
        plain(real(4, 8), torch.tensor([1, -100, 7, -100])),
    ],
    "linear_cross_entropy": [
        called(
            lambda f, x, w, y, n: f(x, w, y, n, num_classes=5, chunk=3),
            X,
            real(8, 6),
            torch.tensor([1, -100, 4, 0]),
            real(4),
        ),
    ],
    "layer_norm": [plain(X), plain(X, ROW), plain(X, ROW, real(6))],
    "rms_norm": [plain(X), plain(X, ROW)],
    "cumsum": [plain(X), called(lambda f, x: f(x, dim=0), X)],
    **_same("softmax log_softmax", plain(X), called(lambda f, x: f(x, dim=0), X)),
    **_same("sum mean", plain(X), called(lambda f, x: f(x, dim=0, keepdim=True), X)),
    "top_k": [called(lambda f, x: f(x, 2), X)],
    "route": [
        called(lambda f, x: f(x, k=2), X),
        called(lambda f, x: f(x, k=2, pre_softmax=True, normalise=True, scale=1.5), X),
        called(
            lambda f, x, b: f(x, b, k=2, score="sigmoid", groups=3, group_top_k=2),
            real(2, 4, 6),
            ROW,
        ),
        called(lambda f, x: f(x, k=1, score="sqrtsoftplus"), X),
    ],
    "weigh": [
        called(lambda f, x, n: f(x, n), real(2, 4, 6), whole(6, 2, 4, 2)),
        called(lambda f, x, n: f(x, n, score="sigmoid"), real(2, 4, 6), whole(6, 2, 4, 2)),
    ],
    "router_probabilities": [plain(X), called(lambda f, x: f(x, score="sigmoid"), X)],
    "expert_counts": [called(lambda f, n: f(n, num_experts=6), whole(7, 2, 4, 6))],
    "drop_over_capacity": [
        called(lambda f, x, n: f(x, n, num_experts=5, capacity=2), real(2, 4, 3), whole(5, 2, 4, 3))
    ],
    "rope": [
        called(lambda f, x, t: f(x, t, last=True, neighbours=True), real(2, 4, 2, 6), TABLE),
        plain(real(2, 4, 2, 6), TABLE),
        plain(real(2, 4, 2, 2, 6), torch.stack([TABLE, TABLE])),
    ],
    "rope_table": [called(lambda f, p: f(p, 4), PLACES)],
    "attention": [
        plain(Q, K, V),
        called(lambda f, q, k, v, p: f(q, k, v, p, causal=False, window=2), Q, K, V, PLACES),
        called(lambda f, q, k, v, p: f(q, k, v, p), Q, K, V, torch.stack([PLACES, PLACES])),
        called(lambda f, q, k, v, n: f(q, k, v, key=n, dropout=0.3), Q, K, V, KEY),
        called(lambda f, q, k, v, d: f(q, k, v, segment_ids=d), Q, K, V, DOCUMENTS),
        called(lambda f, q, k, v, s: f(q, k, v, sinks=s), Q, K, V, real(2, 2)),
    ],
}
"""Name in `megatree.functional` -> its calls."""

NO_OPS = {"Out", "experts", "local_map", "op", "sinkhorn"}
"""What `megatree.functional` exports that is no op: tested in test_local_map, test_op_rules
and test_moe."""


def name_of(function: Any) -> str:
    """Return the name under which a torch function has its cases."""
    name = function.__name__
    if name == "__get__":
        name = function.__self__.__name__
    return name.strip("_").removeprefix("special_")
