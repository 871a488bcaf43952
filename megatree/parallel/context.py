"""How attention runs over a cut sequence: the lowerings that rules may name."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from megatree.functional.attention import attention, check_masks
from megatree.functional.attention_blocks import attention_blocks, blocks_signature
from megatree.functional.attention_kernels import choose_tile_kernel
from megatree.functional.op import OpRule
from megatree.parallel.errors import ShardingError
from megatree.parallel.sources import user_line
from megatree.parallel.typed import TypedTensor
from megatree.parallel.types import ShardType

if TYPE_CHECKING:
    from megatree.parallel.tracer import Tracer

Axes = tuple[str, ...]
_T, _G, _R = 1, 2, 3  # dims of q [b, t, g, r, k]; k and v are [b, t, g, k]
_INTS = ("positions", "segment_ids")

BLOCKS = OpRule(
    name="attention_blocks",
    fn=attention_blocks,
    signature=blocks_signature,
    comm=True,
    communicates=True,
    operands=tuple(inspect.signature(attention_blocks).parameters)[1:-5],
)
"""Attention whose sources travel inside the op: what AllGather and Ring emit."""


@runtime_checkable
class Lowering(Protocol):
    """How an op is emitted: a value in `Rules(lower={name: how})`."""

    def lower(
        self, tracer: "Tracer", rule: OpRule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Emit a call of the op, as `Tracer.declared_op` would; the same value and gradients."""
        ...

    def applies(self, args: tuple[Any, ...]) -> bool:
        """Whether a call with these operands is emitted otherwise than as it stands."""
        ...


@dataclass(frozen=True)
class Call:
    """A call of attention in a trace.

    Args:
        operands: name -> typed value, int key or None.
        options: the static ones.
    """

    operands: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def axes(self) -> Axes:
        """The mesh axes that cut the queries' sequence."""
        return self.operands["q"].type_.spec[_T]

    def with_operands(self, **changed: Any) -> "Call":
        """Return the call with some operands replaced."""
        return Call({**self.operands, **changed}, self.options)

    def emit(self, tracer: "Tracer", rule: OpRule | None = None) -> TypedTensor:
        """Emit the call as attention, or as an op that takes operands of these names."""
        rule = rule or attention.rule  # type: ignore[attr-defined]
        args = tuple(self.operands.get(name) for name in rule.operands)
        while args[-1] is None:
            args = args[:-1]
        return tracer.declared_op(rule, args, dict(self.options))


@dataclass(frozen=True)
class _Attention:
    """What the lowerings share: nothing happens unless the sequence is cut."""

    def applies(self, args: tuple[Any, ...]) -> bool:
        return bool(args[0].type_.spec[_T])

    def lower(
        self, tracer: "Tracer", rule: OpRule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TypedTensor:
        if rule.name != "attention":
            raise ShardingError(
                f"{user_line()}: {rule.name}: {self} lowers attention. Take it out of rules' "
                f"lower={{{rule.name!r}: ...}}."
            )
        named = dict.fromkeys(rule.operands)
        call = Call({**named, **dict(zip(rule.operands, args, strict=False))}, kwargs)
        if not self.applies(args):
            out = call.emit(tracer)
            out.node.meta["note"] = kernel_note(call)
            return out
        _check(tracer, call, self)
        out = self.run(tracer, call)
        note = f"attention by {self} over {'.'.join(call.axes)}: {kernel_note(call, self)}"
        out.node.meta["note"] = note
        return out

    def run(self, tracer: "Tracer", call: Call) -> TypedTensor:
        """Emit attention whose sequence is cut."""
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class AllGather(_Attention):
    """Every rank takes the keys and values of all: one all-gather, in backward again, and a
    reduce-scatter of their gradients. Attention dropout takes this one (or Ulysses).
    """

    def run(self, tracer: "Tracer", call: Call) -> TypedTensor:  # noqa: D102
        if not call.options.get("dropout"):
            return _blocks(tracer, call, "gather")
        gathered = {name: _whole(tracer, call.operands[name]) for name in ("k", "v")}
        for name in _INTS:
            if call.operands[name] is not None and call.operands[f"source_{name}"] is None:
                gathered[f"source_{name}"] = _whole(tracer, call.operands[name], -1)
        return call.with_operands(**gathered).emit(tracer)

    def __str__(self) -> str:
        return "all-gather"


@dataclass(frozen=True)
class Ring(_Attention):
    """Keys and values go round the ranks while they are used, and so do their gradients."""

    def run(self, tracer: "Tracer", call: Call) -> TypedTensor:  # noqa: D102
        _refuse_dropout(call, self)
        return _blocks(tracer, call, "ring")

    def __str__(self) -> str:
        return "ring"


@dataclass(frozen=True)
class Ulysses(_Attention):
    """All-to-all: each rank takes some heads for the whole sequence, and back; `shard` alone.

    Key heads are cut first, then the query heads of a group (their keys and values are gathered).

    Reference: Jacobs et al. 2023, arXiv:2309.14509.
    """

    def run(self, tracer: "Tracer", call: Call) -> TypedTensor:  # noqa: D102
        return _over_heads(tracer, call, call.axes, Call.emit, self)

    def __str__(self) -> str:
        return "all-to-all"


@dataclass(frozen=True)
class Hierarchical(_Attention):
    """An all-to-all over inner ranks (fast links), another lowering over the outer ones.

    Args:
        inner: Ulysses().
        outer: Ring() or AllGather().
        over: the mesh axis of the inner ranks; "" for the innermost one that cuts the sequence.
    """

    inner: Any = field(default_factory=Ulysses)
    outer: Any = field(default_factory=Ring)
    over: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Ulysses) or not isinstance(self.outer, Ring | AllGather):
            raise ShardingError(
                f"Hierarchical: inner is {self.inner}, outer {self.outer}. Give inner=Ulysses() "
                "and outer=Ring() or AllGather()."
            )

    def run(self, tracer: "Tracer", call: Call) -> TypedTensor:  # noqa: D102
        inner = tracer.layout.mesh.axes(self.over) if self.over else call.axes[-1:]
        if not inner or len(inner) == len(call.axes) or call.axes[-len(inner) :] != inner:
            raise ShardingError(
                f"{user_line()}: attention: {self} takes the inner ranks from "
                f"{' '.join(inner) or repr(self.over)}, and the sequence is cut over "
                f"{' '.join(call.axes)}. Cut it over two axes or more, the inner ones last, for "
                "example Mesh(cp=8).refine(fast=2) and over='fast'."
            )
        if isinstance(self.outer, Ring):
            _refuse_dropout(call, self)

        def rest(inside: Call, tracer: "Tracer") -> TypedTensor:
            return self.outer.run(tracer, inside)

        return _over_heads(tracer, call, inner, rest, self)

    def __str__(self) -> str:
        return f"{self.inner} inside {self.outer}"


DEFAULT: Mapping[str, Any] = {"attention": AllGather()}
"""Op name -> its lowering where the rules name none."""


def _check(tracer: "Tracer", call: Call, how: _Attention) -> None:
    q, k, v = (call.operands[name].type_ for name in "qkv")
    for name, ty in (("k", k), ("v", v)):
        if ty.spec[_T] and (ty.spec[_T], _T in ty.permuted) != (q.spec[_T], _T in q.permuted):
            raise ShardingError(
                f"{user_line()}: attention: the sequence of {name} ({ty}) is laid out otherwise "
                f"than that of q ({q}). Lay both out alike with shard(x, ...)."
            )
    masked = call.options.get("causal", True) or call.options.get("window") is not None
    ints = [call.operands[f"{s}{name}"] for name in _INTS for s in ("", "source_")]
    if any(x is not None for x in (call.operands["source_positions"], ints[3])):
        raise ShardingError(
            f"{user_line()}: attention: sources with positions or documents of their own, and a "
            f"sequence that is cut over {' '.join(call.axes)}. shard(k, ...) and shard(v, ...) "
            "whole first."
        )
    window = call.options.get("window")
    check_masks(q.shape[_T], k.shape[_T], window=window, masked=masked, operands=ints)


def _refuse_dropout(call: Call, how: _Attention) -> None:
    if rate := call.options.get("dropout"):
        raise ShardingError(
            f"{user_line()}: attention: {how} has no dropout by key, the rate is {rate}. Lower it "
            "by AllGather() or Ulysses(), or use rate 0."
        )


def _blocks(tracer: "Tracer", call: Call, transport: str) -> TypedTensor:
    """Emit attention whose sources travel inside the op; whole ones stay where they are."""
    if not call.operands["k"].type_.spec[_T]:
        gathered = {
            f"source_{name}": _whole(tracer, call.operands[name], -1)
            for name in _INTS
            if call.operands[name] is not None
        }
        return call.with_operands(**gathered).emit(tracer)
    sources = {
        f"source_{name}": _moved(tracer, call.operands[name], {-1: ()})
        for name in _INTS
        if call.operands[name] is not None
    }
    options = {k: v for k, v in call.options.items() if k != "dropout"}
    inside = Call({**call.operands, **sources}, {**options, "transport": transport})
    return inside.emit(tracer, BLOCKS)


def _over_heads(
    tracer: "Tracer",
    call: Call,
    axes: Axes,
    rest: Callable[[Call, "Tracer"], TypedTensor],
    how: _Attention,
) -> TypedTensor:
    """Move mesh axes from the sequence to the heads, attend, and move them back."""
    q = call.operands["q"]
    ty: ShardType = q.type_
    to_g, to_r = _share(tracer, ty, axes, how)
    left = ty.spec[_T][: len(ty.spec[_T]) - len(axes)]
    g, r = (*ty.spec[_G], *to_g), (*ty.spec[_R], *to_r)
    changed: dict[str, Any] = {"q": _moved(tracer, q, {_T: left, _G: g, _R: r})}
    for name in ("k", "v"):
        x = call.operands[name]
        cut = x.type_.spec[_T][: len(left)] if x.type_.spec[_T] else ()
        changed[name] = _moved(tracer, x, {_T: cut, _G: g})
    for name in _INTS:
        if call.operands[name] is not None:
            changed[name] = _moved(tracer, call.operands[name], {-1: left})
    if call.operands["sinks"] is not None:
        changed["sinks"] = _moved(tracer, call.operands["sinks"], {0: g, 1: r})
    if not left:  # the whole sequence is here: in natural order the fast kernels take it
        for name, dim in {"q": _T, "k": _T, "v": _T, **dict.fromkeys(_INTS, -1)}.items():
            if isinstance(changed.get(name), TypedTensor):
                changed[name] = _natural(tracer, changed[name], dim)
    out = rest(call.with_operands(**changed), tracer)
    if _T in ty.permuted and _T not in out.type_.permuted:
        out = tracer.in_order(out, tuple(sorted({*out.type_.permuted, _T})))
    return _moved(tracer, out, {_T: ty.spec[_T], _G: ty.spec[_G], _R: ty.spec[_R]})


def _share(tracer: "Tracer", q: ShardType, axes: Axes, how: _Attention) -> tuple[Axes, Axes]:
    """Return which mesh axes cut the key heads and which the query heads of a group."""
    sizes = tracer.mesh_sizes

    def parts(names: Axes) -> int:
        return math.prod(sizes[a] for a in names)

    for count in range(len(axes), -1, -1):
        g, r = axes[:count], axes[count:]
        fits_g = q.shape[_G] % parts((*q.spec[_G], *g)) == 0
        if fits_g and q.shape[_R] % parts((*q.spec[_R], *r)) == 0:
            return g, r
    local = [q.shape[d] // parts(q.spec[d]) for d in (_G, _R)]
    n = parts(axes)
    fits = max(d for d in range(1, n + 1) if n % d == 0 and any(x % d == 0 for x in local))
    raise ShardingError(
        f"{user_line()}: attention: {how} cuts heads over {' '.join(axes)} (size {n}), and neither "
        f"the {local[0]} of axis 'kv_heads' on a rank nor the {local[1]} of axis 'group' divide by "
        f"it. Make {' '.join(axes)} {fits}, or lower attention by Ring()."
    )


def _moved(tracer: "Tracer", x: TypedTensor, cuts: Mapping[int, Axes]) -> TypedTensor:
    """Move a value to other cuts of some dims."""
    ty: ShardType = x.type_
    spec = list(ty.spec)
    for dim, axes in cuts.items():
        spec[dim] = axes
    used = {a for axes in spec for a in axes}
    kinds = tuple(
        (axis, "I" if ty.state(axis) == "S" else ty.state(axis))
        for axis in tracer.mesh_sizes
        if axis not in used
    )
    dst = replace(ty, spec=tuple(spec), kinds=kinds)
    return x if dst == ty else tracer.move(x, dst)


def _natural(tracer: "Tracer", x: TypedTensor, dim: int) -> TypedTensor:
    dim %= x.dim()
    return tracer.in_order(x, tuple(d for d in x.type_.permuted if d != dim))


def _whole(tracer: "Tracer", x: TypedTensor, dim: int = _T) -> TypedTensor:
    """Gather a dim and put it into natural order."""
    return _natural(tracer, _moved(tracer, x, {dim: ()}), dim)


def kernel_note(call: Call, how: _Attention | None = None) -> str:
    """Say which kernel runs on which device, and why."""
    q, v = call.operands["q"].type_, call.operands["v"].type_
    options = call.options
    rate = options.get("dropout", 0.0)
    asked = options.get("kernel", "auto")
    if rate or asked == "reference":
        return f"plain torch ({f'dropout {rate} by key' if rate else 'asked for'})"
    plain = call.operands["positions"] is None and call.operands["segment_ids"] is None
    masked = not (plain and options.get("window") is None)
    why_masked = "" if not masked else ", masks from " + (
        "documents" if call.operands["segment_ids"] is not None
        else "positions" if call.operands["positions"] is not None
        else "a window"
    )  # fmt: skip
    if how is None and asked in ("auto", "sdpa") and call.operands["sinks"] is None:
        return f"torch's fused kernels{why_masked}" if masked else "torch's fused causal kernels"
    found = [
        f"{device} {choose_tile_kernel(device, q.dtype, q.shape[-1], v.shape[-1], masked=masked)}"
        for device in ("cpu", "cuda")
    ]
    return f"{'; '.join(found)}{why_masked}"
