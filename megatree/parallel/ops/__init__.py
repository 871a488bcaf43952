"""The sharding rules of torch functions: one table per family."""

from collections.abc import Callable
from typing import Any

from megatree.parallel.ops import contraction, factory, pointwise, reduction, shape
from megatree.parallel.ops.rule import Rule

RULES: dict[Callable[..., Any], Rule] = {
    **pointwise.TABLE,
    **contraction.TABLE,
    **reduction.TABLE,
    **shape.TABLE,
    **factory.TABLE,
}
"""torch function -> how it is typed."""
