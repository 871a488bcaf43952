"""Every op with its calls: the vocabulary, and torch functions with a rule in all spellings."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import megatree.functional as F
from megatree.parallel.ops import RULES
from megatree.parallel.rulecheck import tuple_of
from tests.parallel.rule_cases import TORCH, VOCABULARY, Case, name_of

# Refused in a trace (a value flows into Python), or the name of another function.
NO_OPS = {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__long__, torch.rand}


def cases() -> Iterator[tuple[str, list[Any], Case]]:
    """Return (name, spellings of the function, case)."""
    spellings: dict[str, list[Any]] = {}
    for function in RULES:
        if function not in NO_OPS:
            spellings.setdefault(name_of(function), []).append(function)
    for name, table in TORCH.items():
        yield from ((name, spellings[name], case) for case in table)
    for name, table in VOCABULARY.items():
        yield from ((f"F.{name}", [getattr(F, name)], case) for case in table)


def call(function: Any, case: Case, *xs: Any) -> tuple[Any, ...]:
    """Make the call of a case."""
    return tuple_of(case.call(function, *xs))
