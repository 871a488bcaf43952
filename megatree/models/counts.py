"""How many of a model's parameters a token meets."""

import math

from megatree.functional.chain import Chain
from megatree.functional.param import logical_shape
from megatree.functional.tree import flatten_with_names


def num_active(model: Chain) -> int:
    """Count the learned elements that one token passes: of experts, those of `top_k`.

    Tables count whole, as published numbers have it.
    """
    names, leaves, _ = flatten_with_names(model.params)
    total = 0
    for name, leaf in zip(names, leaves, strict=True):
        count = math.prod(logical_shape(leaf, model.sizes, name)) * leaf.trained
        if "experts" in leaf.names:
            count = count * model.cfg.top_k // model.cfg.experts
        total += count
    return total
