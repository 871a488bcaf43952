"""How evenly a step's tokens went to experts: what a run tells of it, from a model's metrics."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatree.functional.chain import Chain, Stack


def expert_load(outs: Mapping[str, Tensor], model: Chain) -> dict[str, Any]:
    """Return what a report says of a step's mixtures; nothing of a model without them.

    Loads are counted over all microbatches and data axes. `max_load` and `min_load` are those of
    the heaviest and of the lightest expert of any layer over the layer's mean, `entropy` the mean
    over layers of the load's entropy over log(experts), 1 if it is even, and `drops` the share of
    choices that were dropped. Under `layers` every mixture says the same of itself, with the
    `tokens` that each expert took and those `dropped`; its name is "blocks.moe.3", where 3 is its
    number among all layers of the model, dense ones too, counted through all stacks.

    Args:
        outs: of a step (`Metrics.outs`).
        model: whose step it is.
    """
    stacks = [(name, s) for name, s in model.segments.items() if isinstance(s, Stack)]
    units = [f"{name}.{kind}" for name, stack in stacks for kind in stack.pattern]
    layers: dict[str, dict[str, Any]] = {}
    for name, load in outs.items():
        unit, _, metric = name.rpartition(".")
        if metric == "load" and f"{unit}.drops" in outs:
            tokens, dropped = load.double().sum(0), outs[f"{unit}.drops"].double().sum(0)
            numbers = [number for number, other in enumerate(units) if other == unit]
            for number, *pair in zip(numbers, tokens.tolist(), dropped.tolist(), strict=True):
                layers[f"{unit}.{number}"] = _layer(*pair)
    if not layers:
        return {}
    every = list(layers.values())
    dropped = sum(sum(layer["dropped"]) for layer in every)
    chosen = dropped + sum(sum(layer["tokens"]) for layer in every)
    return {
        "experts": {
            "max_load": max(layer["max_load"] for layer in every),
            "min_load": min(layer["min_load"] for layer in every),
            "entropy": sum(layer["entropy"] for layer in every) / len(every),
            "drops": dropped / chosen,
            "layers": layers,
        }
    }


def _layer(tokens: list[float], dropped: list[float]) -> dict[str, Any]:
    total, num_experts = sum(tokens), len(tokens)
    shares = [n / total for n in tokens if n > 0]
    entropy = -sum(share * math.log(share) for share in shares)
    return {
        "max_load": max(tokens) * num_experts / total,
        "min_load": min(tokens) * num_experts / total,
        "entropy": entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        "drops": sum(dropped) / (sum(dropped) + total),
        "tokens": [int(n) for n in tokens],
        "dropped": [int(n) for n in dropped],
    }
