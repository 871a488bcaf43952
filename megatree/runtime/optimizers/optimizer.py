"""What an optimizer is: two functions over flat buffers, and what it is told about each buffer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Schedule = Callable[[int], float]
"""step (the first is 0) -> value."""

Buffers = Mapping[str, Tensor]
"""group name -> buffer [rows, size]."""

State = dict[str, dict[str, Tensor]]
"""entry ("m", "v", ...) -> buffers like those of the parameters."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A leaf of a group that is a matrix, as Muon has to see it: whole.

    Its dims are, in order, `num_batch_dims` that count matrices (experts), those of the rows of
    one matrix and those of its columns.

    Args:
        start: first element in a row of the buffer.
        shape: of this rank's piece, per row of the buffer.
        gather: [rows, *piece] -> [rows, *whole]; a collective where the leaf is cut.
        cut: [rows, *whole] -> [rows, *piece], the inverse, without communication.
        num_batch_dims: leading dims over which the leaf is a stack of matrices; these may stay cut.
        num_column_dims: trailing dims that are the columns of a matrix.
        columns_are_inputs: whether a product contracts the columns (false for wo and w_down, whose
            embed comes last and is what they give).
    """

    start: int
    shape: tuple[int, ...]
    gather: Callable[[Tensor], Tensor]
    cut: Callable[[Tensor], Tensor]
    num_batch_dims: int = 0
    num_column_dims: int = 1
    columns_are_inputs: bool = True


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """How a group differs from the others.

    Args:
        lr: times the learning rate.
        decay: times the weight decay.
        matrices: leaves for Muon to orthogonalise; other optimizers treat them like any other.
    """

    lr: float = 1.0
    decay: float = 1.0
    matrices: tuple[Matrix, ...] = ()


class Init(Protocol):
    """Makes an optimizer's state."""

    def __call__(self, params: Buffers, groups: Mapping[str, GroupRule] | None = None) -> State:
        """Return the state before the first update; see `Optimizer`."""
        ...


class Update(Protocol):
    """Makes one update in place."""

    def __call__(
        self,
        params: Buffers,
        grads: Buffers,
        state: State,
        *,
        step: int,
        groups: Mapping[str, GroupRule],
        scale: Tensor | float = 1.0,
        found_inf: Tensor | None = None,
        copies: Buffers | None = None,
    ) -> None:
        """Change `params` and `state` in place; see `Optimizer`."""
        ...


class Optimizer(NamedTuple):
    """Two functions: `init(params, groups)` -> state, and `update(params, grads, state, ...)`.

    `init` makes buffers like those of `params`, float32 (float64 for float64 parameters) or
    narrower where the optimizer was asked for that. It needs `groups` only to leave out what no
    leaf of a group uses (Muon). There is no master copy in the state: what is stored in two
    precisions is the step's business, and `params` are then the masters.

    `update` changes `params` and `state` in place, and may use `grads` as scratch memory. All are
    group name -> [rows, size], of which only the last dim has to be dense; calls with some of the
    groups, or some of their rows, make the same update as one call. Numbers narrower than float32
    are widened row by row and rounded to nearest on their way back.

    - `step`: number of updates made before this one.
    - `groups`: group name -> rule, at least for the groups of `params`.
    - `scale`: a scalar tensor (or 1.0) that multiplies the gradients: clipping and unscaling.
    - `found_inf`: None, or a float32 scalar tensor: with 1 there, params and state keep every bit.
      Nothing waits for its value.
    - `copies`: None, or group name -> narrower copy of its parameters, of the same layout, which
      is written too.
    """

    init: Init
    update: Update


def write_copies(params: Buffers, copies: Buffers | None) -> None:
    """Round parameters to the nearest numbers of their copies."""
    for name, copy in (copies or {}).items():
        copy.copy_(params[name])


def value_at(value: float | Schedule, step: int) -> float:
    """Return a number, or what a schedule says at a step."""
    return value(step) if callable(value) else value


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_numbers(place: str, **values: float | Schedule) -> None:
    """Refuse negative numbers among an optimizer's options."""
    for name, value in values.items():
        if not callable(value) and not value >= 0.0:
            raise ValueError(f"{place}.{name}: {value} is negative. Give at least 0.")


def check_decays(place: str, decays: tuple[float, ...], moments: torch.dtype) -> None:
    """Refuse decay rates outside [0, 1), and those that moments of this dtype cannot follow.

    A number whose relative change per step is below half its distance to the next one never moves.
    """
    for decay in decays:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"{place}: {decay} is not a decay. Use one in [0, 1).")
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{place}: moments of {moments} would overflow or vanish. Use float32 or bfloat16."
            )
        least = torch.finfo(moments).eps / 2
        if 1.0 - decay < least:
            raise ValueError(
                f"{place}: {moments} moments cannot follow a decay of {decay}: a change of "
                f"{1.0 - decay:.2g} is less than their rounding, {least:.2g}. "
                f"Use at most {1.0 - least:.6g}, or moments=torch.float32."
            )


def zeros(params: Buffers, moments: torch.dtype) -> dict[str, Tensor]:
    """Return zeroed buffers: of `moments`, but float64 for float64 parameters."""
    return {
        name: torch.zeros(
            p.shape, dtype=p.dtype if p.dtype == torch.float64 else moments, device=p.device
        )
        for name, p in params.items()
    }
