"""A model as a chain of segments over a carry: `embed -> Stack -> head`."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol, runtime_checkable

import optree
import torch
from torch import Tensor

from megatree.functional.param import Array, num_elements, stacked
from megatree.functional.tree import map_with_names


@runtime_checkable
class Block(Protocol):
    """The protocol of a segment's function.

    `w` its parameters (a tree of tensors), `carry` what the segment before returned, `consts` the
    batch entries and tables (in a stack also `consts["layer"]`, the layer's number), `cfg` the
    model's configuration. Returns the new carry and a tree of outputs: loss terms under "terms"
    (`{"terms": {"loss": (sum, weight)}}`), and metrics under any other key.
    """

    def __call__(
        self, w: Any, carry: Any, consts: Mapping[str, Tensor], cfg: Any, *, state: Any = None
    ) -> tuple[Any, Any]:
        """Run the segment."""
        ...


Move = Callable[[Mapping[str, Tensor], Any], Tensor]
"""(metrics of a step, cfg) -> what is added to a leaf that is not trained."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A link of a chain: a function with its own parameters.

    Args:
        apply: the function (see `Block`).
        params: tree of Param, its own leaves.
        borrows: name in `w` -> path in the model's parameters ("embed.table"), for tied leaves.
        moves: leaf that is not trained -> function of (the segment's metrics of a step, each with a
            leading axis of microbatches, cfg) to what is added to the whole leaf after the step;
            in a stack, of a layer.
        end: what runs instead of `apply` where a chain is made to end here (`Chain.up_to`), for a
            segment that else consumes what it computes; None: `apply`.
    """

    apply: Block
    params: Mapping[str, Any] = field(default_factory=dict)
    borrows: Mapping[str, str] = field(default_factory=dict)
    moves: Mapping[str, Move] = field(default_factory=dict)
    end: Block | None = None

    def __post_init__(self) -> None:
        for name in self.moves:
            if name not in self.params or self.params[name].trained:
                raise ValueError(
                    f"Segment: moves names {name!r}, which is no leaf of its own that is not "
                    "trained. Declare it as Param(..., trained=False)."
                )
        both = sorted(set(self.params) & set(self.borrows))
        if both:
            raise ValueError(f"Segment: {both} are both own and borrowed. Rename one of them.")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that map a carry to a carry of the same type, leaves stacked per kind on a "layers"
    axis.

    Args:
        kinds: kind -> Segment.
        pattern: the kind of every layer, in order.
    """

    kinds: Mapping[str, Segment]
    pattern: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(self.kinds))
        if unknown:
            raise ValueError(
                f"Stack: pattern names {unknown}, kinds are {sorted(self.kinds)}. "
                "Add the kind or correct the pattern."
            )

    @property
    def params(self) -> dict[str, Any]:
        """The tree of Param, leaves stacked per kind."""
        return {
            kind: stacked(segment.params, self.pattern.count(kind))
            for kind, segment in self.kinds.items()
            if kind in self.pattern
        }

    def layers(self) -> list[tuple[str, int]]:
        """Return (kind, index among the layers of that kind) of every layer."""
        return [(kind, self.pattern[:i].count(kind)) for i, kind in enumerate(self.pattern)]


def no_tables(batch: Mapping[str, Tensor], cfg: Any) -> dict[str, Tensor]:
    """Return the batch itself as the consts."""
    return dict(batch)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A model: named segments, the batch it takes and the sizes of its axes.

    Args:
        segments: name -> Segment or Stack, in the order in which the carry passes them.
        cfg: the model's configuration, handed to every segment.
        sizes: axis name -> global size (the batch's and the sequence's included).
        batch: entry name -> Array.
        consts: function from (batch, cfg) to the consts that every segment sees.
        dtype: dtype of parameters that do not name one.
        eval_cfg: the configuration for evaluation if it differs (no dropout); the batch then has
            nothing that the step adds.
        survey: batch entry -> metric of a kind of a stack ("blocks.moe.best") -> the row of the
            entry that is the stack's layer 0. Rows [layers, ...] hold the metric's mean over all
            microbatches of the step, which a first forward finds; all are zero where a step has one
            microbatch.
    """

    segments: Mapping[str, Segment | Stack]
    cfg: Any
    sizes: Mapping[str, int]
    batch: Mapping[str, Array]
    consts: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]] = no_tables
    dtype: torch.dtype = torch.float32
    eval_cfg: Any = None
    survey: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def added(self) -> frozenset[str]:
        """The batch entries that the step adds to what data give."""
        return frozenset({"key", *self.survey}) & set(self.batch)

    @property
    def moves(self) -> dict[str, Move]:
        """Path of a leaf that is not trained -> what moves it after a step (`Segment.moves`)."""
        out: dict[str, Move] = {}
        for name, segment in self.segments.items():
            kinds = segment.kinds if isinstance(segment, Stack) else {"": segment}
            for kind, part in kinds.items():
                prefix = f"{name}.{kind}" if kind else name
                out |= {f"{prefix}.{leaf}": move for leaf, move in part.moves.items()}
        return out

    @property
    def params(self) -> dict[str, Any]:
        """The tree of Param."""
        return {name: segment.params for name, segment in self.segments.items() if segment.params}

    @property
    def num_params(self) -> int:
        """The number of learned elements, padding excluded."""
        return num_elements(self.params, self.sizes)

    def with_sizes(self, **sizes: int) -> "Chain":
        """Return the model for other axis sizes (a batch, a sequence)."""
        return replace(self, sizes={**self.sizes, **sizes})

    def for_evaluation(self) -> "Chain":
        """Return the model without what only training does; itself if there is no difference."""
        if self.eval_cfg is None:
            return self
        batch = {name: array for name, array in self.batch.items() if name not in self.added}
        return replace(self, cfg=self.eval_cfg, batch=batch, eval_cfg=None, survey={})

    def up_to(self, last: str) -> "Chain":
        """Return the chain that ends with the segment `last`."""
        names = list(self.segments)
        if last not in names:
            raise ValueError(f"Chain: no segment {last!r}. Segments are {names}.")
        kept = {name: self.segments[name] for name in names[: names.index(last) + 1]}
        final = kept[last]
        if isinstance(final, Segment) and final.end is not None:
            kept[last] = replace(final, apply=final.end, end=None)
        return replace(self, segments=kept)

    def apply(self, params: Any, batch: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
        """Run the model on plain tensors: the fold of the carry over the segments.

        Args:
            params: tree of whole tensors, as `self.params` declares them.
            batch: tree of whole tensors, as `self.batch` declares them.

        Returns:
            The last carry and, by segment name, the outputs of the segments that have any; a
            stack's are stacked over its layers, by kind.
        """
        consts = self.consts(batch, self.cfg)
        carry: Any = None
        outs: dict[str, Any] = {}
        for name, segment in self.segments.items():
            if isinstance(segment, Stack):
                carry, out = _apply_stack(segment, params, params[name], carry, consts, self.cfg)
            else:
                w = segment_params(segment, params, params.get(name, {}))
                carry, out = segment.apply(w, carry, consts, self.cfg)
            if optree.tree_leaves(out):
                outs[name] = out
        return carry, outs


def lookup(tree: Any, path: str) -> Any:
    """Return the leaf or subtree at a dotted path."""
    return reduce(operator.getitem, path.split("."), tree)


def segment_params(segment: Segment, params: Any, own: Any) -> dict[str, Any]:
    """Return a segment's `w`: its own leaves and those it borrows from the model's parameters."""
    return {**own, **{name: lookup(params, path) for name, path in segment.borrows.items()}}


def _apply_stack(
    stack: Stack, params: Any, own: Any, carry: Any, consts: dict[str, Tensor], cfg: Any
) -> tuple[Any, Any]:
    outs: dict[str, list[Any]] = {kind: [] for kind in own}
    device = next(iter(optree.tree_leaves(own))).device
    views = {kind: map_with_names(lambda _, leaf: leaf.unbind(0), own[kind]) for kind in own}
    for number, (kind, index) in enumerate(stack.layers()):
        layer = optree.tree_map(
            operator.itemgetter(index), views[kind], is_leaf=lambda x: isinstance(x, tuple)
        )
        w = segment_params(stack.kinds[kind], params, layer)
        at = {**consts, "layer": torch.tensor(number, dtype=torch.int64, device=device)}
        carry, out = stack.kinds[kind].apply(w, carry, at, cfg)
        outs[kind].append(out)
    return carry, {kind: stack_outputs(kind_outs) for kind, kind_outs in outs.items()}


def stack_outputs(outs: list[Any]) -> Any:
    """Stack the outputs of the layers of one kind, leaf by leaf."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *outs)
