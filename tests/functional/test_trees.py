"""optree and jax flatten the trees of this package in one order."""

from typing import Any

import jax
import optree
import pytest
import torch

from megatree.functional.param import init
from megatree.functional.tree import flatten_with_names
from megatree.models.gpt import GPTConfig, gpt

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu",
        "bias": True,
        "tied": True,
    },
    "random": {"dropout": 0.1},
}


def trees(name: str) -> dict[str, Any]:
    cfg = GPTConfig(
        vocab_size=11, seq_length=4, num_layers=2, embed=6, kv_heads=1, head_dim=4, ffn=8,
        **MODELS[name],
    )  # fmt: skip
    model = gpt(cfg, batch_size=2)
    params = init(model.params, model.sizes, seed=0)
    batch = {
        "tokens": torch.zeros(2, 4, dtype=torch.int64),
        "labels": torch.zeros(2, 4, dtype=torch.int64),
        "weights": torch.ones(2, 4),
        "key": torch.tensor(1),
    }
    return {
        "declared": model.params,
        "params": params,
        "batch": model.batch,
        "consts": model.consts(batch, cfg),
        "outs": model.apply(params, batch),
        "state": {
            "step": 3,
            "params": params,
            "opt": {
                "v": optree.tree_map(torch.zeros_like, params),
                "m": None,
                "Z": [1, None, (2,)],
            },
        },
    }


@pytest.mark.parametrize("name", MODELS)
def test_optree_and_jax_agree_on_leaves_and_paths(name: str) -> None:
    """A carry flattened in two key orders hands a gradient to the wrong tensor."""
    for what, tree in trees(name).items():
        names, leaves, _ = flatten_with_names(tree)
        theirs = jax.tree_util.tree_flatten_with_path(tree)[0]
        assert len(leaves) == len(theirs) > 0, what
        assert all(a is b for a, (_, b) in zip(leaves, theirs, strict=True)), what
        paths = [
            ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)
            for path, _ in theirs
        ]
        assert names == paths, what


def test_none_is_no_leaf_and_keys_are_sorted() -> None:
    tree: Any = {"b": None, "a": (1, None), "B": [2]}
    assert optree.tree_leaves(tree) == jax.tree_util.tree_leaves(tree) == [2, 1]
