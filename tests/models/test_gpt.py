"""The decoder's own laws: refusals, positions, dropout, first values."""

import itertools
import math
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from megatree.functional.chain import Chain
from megatree.functional.documents import positions_of
from megatree.functional.param import init
from megatree.models.gpt import GPTConfig, finish, gpt
from tests.tolerances import RELATIVE, distance

SIZES: dict[str, Any] = {
    "vocab_size": 13, "seq_length": 6, "num_layers": 2, "embed": 8, "kv_heads": 2, "group": 2,
    "head_dim": 4, "ffn": 12,
}  # fmt: skip
LEARNED = {"positions": "learned", "norm": "layer", "bias": True}


TOKENS = torch.randint(0, 13, (3, 2, 7), generator=torch.Generator().manual_seed(0))


def run(model: Chain, params: Any, **changes: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and summed loss."""
    tokens = TOKENS[0]
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "weights": torch.ones(2, 6),
        **changes,
    }
    logits, _ = model.up_to("head").apply(params, batch)
    return logits, model.apply(params, batch)[1]["loss"]["terms"]["loss"][0]


def build(**fields: Any) -> tuple[Chain, Any]:
    model = gpt(GPTConfig(**SIZES, **fields), batch_size=2, dtype=torch.float64)
    return model, init(model.params, model.sizes, seed=0, dtype=torch.float64)


REFUSALS = [
    ({"embed": 0}, r"GPTConfig: embed is 0\. Give at least 1\."),
    ({"norm": "batch"}, r"GPTConfig: norm is 'batch'\. Use one of rms, layer\."),
    ({"positions": "alibi"}, r"GPTConfig: positions is 'alibi'\. Use one of rotary, learned\."),
    ({"activation": "relu"}, r"activation is 'relu'\. Use one of swiglu, gelu, gelu_tanh, squared"),
    ({"dropout": 1.0}, r"GPTConfig: dropout is 1\.0\. Give a rate in \[0, 1\)\."),
    ({"norm_eps": 0.0}, r"GPTConfig: norm_eps is 0\.0\. Give a positive number\."),
    ({"rope_base": math.nan}, r"GPTConfig: rope_base is nan\. Give a positive number\."),
    ({"mtp": 1, "mtp_weight": math.nan}, r"mtp is 1 with mtp_weight nan\. Give positive numbers"),
    ({"mtp": 1, "mtp_weight": math.inf}, r"mtp is 1 with mtp_weight inf\. Give positive numbers"),
    ({"head_dim": 5}, r"head_dim is 5, and rotary positions turn pairs\. Make head_dim even\."),
    ({"vocab_pad": 0}, r"GPTConfig: vocab_pad is 0\. Give at least 1\."),
]


@pytest.mark.parametrize(("fields", "error"), REFUSALS)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], error: str) -> None:
    # Where beartype checks annotations, it comes first for an unknown choice.
    with pytest.raises((ValueError, TypeError), match=f"{error}|Type-check error"):
        GPTConfig(**{**SIZES, **fields})


@pytest.mark.parametrize("fields", [{}, LEARNED])
def test_documents_side_by_side_give_the_logits_of_each_alone(fields: dict[str, Any]) -> None:
    """Attention that looks into the document before, or positions that count on, would show."""
    model, params = build(**fields)
    tokens = TOKENS[0, :, :-1]
    segments = torch.tensor([0, 0, 1, 1, 1, 1]).expand(tokens.shape)
    packed, _ = run(
        model, params, tokens=tokens, segments=segments, positions=positions_of(segments)
    )
    for part in (slice(0, 2), slice(2, 6)):
        alone, _ = run(model, params, tokens=tokens[:, part], labels=tokens[:, part],
                       weights=torch.ones_like(tokens[:, part]).double())  # fmt: skip
        assert distance(packed[:, part], alone) < RELATIVE[torch.float64]


@pytest.mark.parametrize("fields", [{}, LEARNED])
def test_later_tokens_do_not_change_earlier_logits(fields: dict[str, Any]) -> None:
    model, params = build(**fields)
    logits, _ = run(model, params)
    tokens = TOKENS[0, :, :-1].clone()
    tokens[:, 4:] = (tokens[:, 4:] + 1) % 13
    changed, _ = run(model, params, tokens=tokens)
    assert torch.equal(changed[:, :4], logits[:, :4])
    assert (changed[:, 4:] != logits[:, 4:]).all(-1).all()


@pytest.mark.parametrize(
    "fields", [{"dropout": 0.2}, {"attention_dropout": 0.2}, LEARNED | {"dropout": 0.2}]
)
def test_dropout_is_a_function_of_the_key(fields: dict[str, Any]) -> None:
    model, params = build(**fields)
    assert "key" in model.batch
    first, _ = run(model, params, key=torch.tensor(1))
    assert torch.equal(first, run(model, params, key=torch.tensor(1))[0])
    assert not torch.equal(first, run(model, params, key=torch.tensor(2))[0])
    plain, _ = build(**{k: v for k, v in fields.items() if "dropout" not in k})
    assert "key" not in plain.batch
    assert not torch.equal(first, run(plain, params)[0])


def test_layers_and_places_drop_differently() -> None:
    """One key per place: with equal layers, equal masks would show as equal additions."""
    cfg = GPTConfig(**SIZES, dropout=0.5)
    y = torch.ones(2, 6, 8)
    masks = [
        finish(y, {}, weight, {"key": torch.tensor(1), "layer": torch.tensor(layer)}, cfg)
        for layer in range(2)
        for weight in ("wo", "w_down")
    ]
    assert len({tuple((mask == 0).flatten().tolist()) for mask in masks}) == 4


CHOICES = {
    "activation": ("swiglu", "gelu", "gelu_tanh", "squared_relu"),
    "norm": ("rms", "layer"),
    "positions": ("rotary", "learned"),
    "bias": (False, True),
    "tied": (False, True),
}


@pytest.mark.parametrize("choice", list(itertools.product(*CHOICES.values())), ids=str)
def test_every_parameter_of_every_config_has_a_gradient(choice: tuple[Any, ...]) -> None:
    """A declared leaf that is not read, or a bias read twice, costs memory or is wrong."""
    model, params = build(**dict(zip(CHOICES, choice, strict=True)))
    params = optree.tree_map(lambda x: (x + 0.1).requires_grad_(), params)
    _, loss = run(model, params)
    paths, leaves, _ = optree.tree_flatten_with_path(params)
    grads = torch.autograd.grad(loss, leaves)
    dead = [path for path, g in zip(paths, grads, strict=True) if g.abs().max() == 0]
    assert not dead
    assert model.num_params == sum(leaf.numel() for leaf in leaves)


def test_output_projections_start_smaller_with_depth() -> None:
    wide: dict[str, Any] = {**SIZES, "embed": 64, "ffn": 64, "num_layers": 8}
    cfg = GPTConfig(**wide, init_std=0.1)
    model = gpt(cfg, batch_size=2)
    params = init(model.params, model.sizes, seed=0)["blocks"]["dense"]
    for name, std in (("w_up", 0.1), ("w_down", 0.1 / 4), ("wo", 0.1 / 4), ("wq", 0.1)):
        assert math.isclose(params[name].std().item(), std, rel_tol=0.02), name


def test_torch_func_differentiates_the_whole_model() -> None:
    """Per-example gradients: vmap over grad of the model, against one example at a time."""
    model, params = build()

    def loss(params: Any, tokens: Tensor) -> Tensor:
        return run(model, params, tokens=tokens[:, :-1], labels=tokens[:, 1:])[1]

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, TOKENS)
    for i in range(3):
        one = torch.func.grad(loss)(params, TOKENS[i])
        for a, b in zip(optree.tree_leaves(together), optree.tree_leaves(one), strict=True):
            assert distance(a[i], b) < RELATIVE[torch.float64]
