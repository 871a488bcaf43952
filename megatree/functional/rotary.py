"""Rotary position embedding, as a table of positions and its application."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatree.functional.op import op
from megatree.functional.transforms import plain


def rope_table(
    positions: Int[Tensor, "..."],
    dim: int,
    *,
    base: float = 10000.0,
    scaling: tuple[float, float, float, float] | None = None,
    yarn: tuple[float, float, float, float] | None = None,
    magnitude: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "... c"]:
    """Return the cosines, then the sines, of the angles by which `rope` turns pairs of elements.

    Pair i turns by position * base^(-2i / dim). Angles are float64 whatever `dtype`: in float32
    an angle of 1e5 radians is off by 4e-3.

    Args:
        positions: tokens, [...] ([t] or [b, t]).
        dim: number of elements that are turned, twice the number of pairs.
        base: inverse frequency of the slowest pair, about.
        scaling: (factor, low, high, length) slows pairs that turn less than `low` times in `length`
            tokens by the factor, leaves those that turn more than `high` times, and blends between;
            None leaves all.
        yarn: (factor, fast, slow, length) slows pairs that turn less than `slow` times in `length`
            tokens by the factor, leaves those that turn more than `fast` times, and blends between,
            evenly from pair to pair; None leaves all.
        magnitude: multiplies the table, so that turned elements grow by it (see `yarn_magnitude`).
        dtype: dtype of the table.

    Returns:
        [..., dim].

    Raises:
        ValueError: `dim` is odd.

    Reference: Su et al. 2021, arXiv:2104.09864, section 3.2.2; Grattafiori et al. 2024,
    arXiv:2407.21783, section 3.4.2 (scaling); Peng et al. 2023, arXiv:2309.00071, section 3.2
    (yarn).
    """
    if dim % 2:
        raise ValueError(
            f"rope_table: dim is {dim}, pairs of elements are turned. Give an even dim."
        )
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    frequencies = torch.pow(base, -exponents)
    if scaling is not None:
        factor, low, high, length = scaling
        turns = frequencies * (length / (2 * math.pi))
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = frequencies * (kept + (1.0 - kept) / factor)
    if yarn is not None:
        factor, fast, slow, length = yarn
        first, last = (_pair_that_turns(times, length, dim, base) for times in (fast, slow))
        low, high = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        pair = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
        slowed = ((pair - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
        frequencies = frequencies * (1.0 - slowed + slowed / factor)
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    table = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return (table if magnitude == 1.0 else table * magnitude).to(dtype)


def _pair_that_turns(times: float, length: float, dim: int, base: float) -> float:
    """Return the number, with a fraction, of the pair that turns so often in `length` tokens."""
    return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """Return how much larger scores are made where positions are slowed: 0.1 scale ln(factor) + 1.

    Reference: Peng et al. 2023, arXiv:2309.00071, equation 22.

    >>> yarn_magnitude(1.0), round(yarn_magnitude(40.0), 4)
    (1.0, 1.3689)
    """
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _rope_signature(ranks: Sequence[int]) -> str:
    middle = " ".join(f"m{i}" for i in range(ranks[0] - 3))
    table = "t c!" if ranks[1] == 2 else "b t c!"
    return f"b t {middle} k!, {table} -> b t {middle} k!"


@op(_rope_signature, linear=[[0]])
def rope(
    x: Float[Tensor, "b t *m k"],
    table: Float[Tensor, "*bt c"],
    *,
    last: bool = False,
    neighbours: bool = False,
) -> Float[Tensor, "b t *m k"]:
    """Turn the pairs (i, i + c/2) of the first c elements of the last dim; leave the rest.

    Args:
        x: [b, t, ..., k].
        table: of `rope_table`, [t, c] or [b, t, c], c at most k.
        last: turn the last c elements, and leave the first.
        neighbours: turn the pairs (2 i, 2 i + 1) instead.

    Returns:
        [b, t, ..., k], of the dtype of `x`.

    Raises:
        ValueError: the table turns more elements than there are.
    """
    turned = table.shape[-1]
    if turned > x.shape[-1]:
        raise ValueError(
            f"rope: the table turns {turned} elements, the last dim has {x.shape[-1]}. "
            "Give rope_table a smaller dim."
        )
    one = (1,) * (x.dim() - 3)
    cos, sin = table.reshape(*table.shape[:-1], *one, turned).chunk(2, dim=-1)
    if neighbours:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], dim=-1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    rest = x.shape[-1] - turned
    pairs = x[..., rest:] if last else x[..., :turned]
    if plain(x, table) and not table.requires_grad:
        out = _Turn.apply(pairs, cos, sin, 1.0, neighbours)
    else:
        out = _turn(pairs, cos, sin, 1.0, neighbours)
    if not rest:
        return out
    return torch.cat([x[..., :rest], out] if last else [out, x[..., turned:]], dim=-1)


def _turn(pairs: Tensor, cos: Tensor, sin: Tensor, direction: float, neighbours: bool) -> Tensor:
    if neighbours:
        partner = pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(pairs * cos, partner, sin, value=direction).to(pairs.dtype)
    if torch.compiler.is_compiling():
        # Two halves: inductor reads what a roll gives element by element (11.2 against 3.3 ms).
        a, b = pairs.chunk(2, dim=-1)
        low, high = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[1] * direction
        return torch.cat([a * low - b * high, b * low + a * high], dim=-1).to(pairs.dtype)
    # roll, not two halves and a cat: 1.4 against 2.8 ms, forward and backward, on [16, 256, 8, 16].
    partner = pairs.roll(pairs.shape[-1] // 2, dims=-1)
    return torch.addcmul(pairs * cos, partner, sin, value=direction).to(pairs.dtype)


class _Turn(torch.autograd.Function):
    """The same, with the turn back as its backward: 1.1 against 1.6 ms, and x is not saved."""

    @staticmethod
    def forward(
        ctx: Any, pairs: Tensor, cos: Tensor, sin: Tensor, direction: float, neighbours: bool
    ) -> Tensor:
        if pairs.device.type == "cpu" and cos.dim() < pairs.dim():
            # Loops over [batch, the rest] are vectorised, over [.., 1, k] with a small k are not.
            shape = (*pairs.shape[1:-1], cos.shape[-1])
            cos, sin = cos.expand(shape).contiguous(), sin.expand(shape).contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.direction, ctx.neighbours = direction, neighbours
        return _turn(pairs, cos, sin, direction, neighbours)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        turned_back = _Turn.apply(grad, cos, sin, -ctx.direction, ctx.neighbours)
        return turned_back, None, None, None, None
