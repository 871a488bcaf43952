"""Rotary positions against Hugging Face and the law of relative positions."""

import math

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import megatree.functional as F
from megatree.functional.rotary import yarn_magnitude
from tests.functional.check import assert_same, rand
from tests.tolerances import RELATIVE, distance


def hugging_face(x: Tensor, table: Tensor) -> Tensor:
    """Apply their half rotation to [b, t, h, k]."""
    cos, sin = (torch.cat([half, half], -1) for half in table.chunk(2, -1))
    if table.dim() == 2:
        cos, sin = cos[None], sin[None]
    out, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batched", [False, True])
def test_rope_equals_hugging_face(batched: bool, dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4], [3, 9, 1, 0, 7]]) if batched else torch.arange(5)
    table = F.rope_table(positions, 8, dtype=dtype)
    x = rand(2, 5, 3, 8, dtype=dtype)
    assert_same(lambda x: F.rope(x, table), lambda x: hugging_face(x, table), x)
    assert_same(F.rope, hugging_face, x, table)  # the table's gradient takes another path


def test_rope_takes_any_dims_between_t_and_k() -> None:
    table = F.rope_table(torch.arange(5), 6, dtype=torch.float64)
    x = rand(2, 5, 3, 2, 6)
    flat = F.rope(x.flatten(2, 3), table)
    assert torch.equal(F.rope(x, table), flat.unflatten(2, (3, 2)))
    assert torch.equal(F.rope(x[:, :, 0, 0], table), flat[:, :, 0])


def test_partial_rope_leaves_the_rest() -> None:
    table = F.rope_table(torch.arange(5), 4, dtype=torch.float64)
    x = rand(2, 5, 3, 10)
    out = F.rope(x, table)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(out[..., :4], F.rope(x[..., :4], table))


def test_the_last_elements_may_turn() -> None:
    table = F.rope_table(torch.arange(5), 4, dtype=torch.float64)
    x = rand(2, 5, 3, 10)
    out = F.rope(x, table, last=True)
    assert torch.equal(out[..., :6], x[..., :6])
    assert torch.equal(out[..., 6:], F.rope(x[..., 6:].contiguous(), table))


@pytest.mark.parametrize("learned", [False, True])
def test_neighbours_turn_as_deepseek_has_it(learned: bool) -> None:
    """They lay what has turned out by halves, which no score sees; we leave it in place."""
    table = F.rope_table(torch.arange(5), 8, dtype=torch.float64)

    def theirs(x: Tensor, table: Tensor) -> Tensor:
        cos, sin = (torch.cat([half, half], -1)[None] for half in table.chunk(2, -1))
        out, _ = apply_rotary_pos_emb_interleave(x, x, cos, sin, unsqueeze_dim=2)
        return torch.stack(out.chunk(2, -1), -1).flatten(-2)

    x = rand(2, 5, 3, 8)
    if learned:  # the table's gradient takes another path
        assert_same(lambda x, t: F.rope(x, t, neighbours=True), theirs, x, table)
    else:
        ours = lambda x: F.rope(x, table, neighbours=True)  # noqa: E731
        assert_same(ours, lambda x: theirs(x, table), x)


@pytest.mark.parametrize(
    "yarn", [(4.0, 32.0, 1.0, 4096.0), (40.0, 32.0, 1.0, 4096.0), (8.0, 2.0, 1.9, 64.0)]
)
def test_yarn_is_that_of_transformers(yarn: tuple[float, float, float, float]) -> None:
    factor, fast, slow, length = yarn
    config = DeepseekV3Config(
        qk_rope_head_dim=64,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "beta_fast": fast,
            "beta_slow": slow, "original_max_position_embeddings": int(length), "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    )  # fmt: skip
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
    ours = yarn_magnitude(factor, 0.7) / yarn_magnitude(factor, 1.0)
    assert magnitude == pytest.approx(ours, rel=1e-12)
    places = torch.tensor([0, 1, 50, 1000])
    table = F.rope_table(places, 64, yarn=yarn, magnitude=ours, dtype=torch.float64)
    angles = places.double()[:, None] * frequencies.double()
    expected = torch.cat([angles.cos(), angles.sin()], -1) * ours
    assert distance(table, expected) < 1e-4  # their frequencies are float32
    assert distance(table, F.rope_table(places, 64, dtype=torch.float64) * ours) > 1e-2


def test_scores_depend_on_the_difference_of_positions() -> None:
    q, k = rand(1, 1, 1, 8), rand(1, 1, 1, 8, seed=1)

    def score(at_q: int, at_k: int) -> Tensor:
        def turn(x: Tensor, at: int) -> Tensor:
            return F.rope(x, F.rope_table(torch.tensor([at]), 8, dtype=torch.float64))

        return (turn(q, at_q) * turn(k, at_k)).sum()

    assert math.isclose(score(5, 2).item(), score(105, 102).item(), rel_tol=1e-12)
    assert not math.isclose(score(5, 2).item(), score(5, 3).item(), rel_tol=1e-3)


def test_table_is_exact_far_from_the_start() -> None:
    """Float32 angles would be off by 4e-3 at position 100 000."""
    table = F.rope_table(torch.tensor([100_003]), 4, base=100.0)
    angles = torch.tensor([100_003.0, 100_003.0 / 10.0], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()])[None]
    assert table.dtype == torch.float32
    assert distance(table, expected) < 1e-7


def test_rope_of_half_precision_is_computed_with_the_table_s() -> None:
    table = F.rope_table(torch.arange(64), 8)
    x = rand(1, 64, 1, 8).to(torch.bfloat16)
    got = F.rope(x, table)
    assert got.dtype == torch.bfloat16
    assert distance(got, F.rope(x.double(), table.double())) < RELATIVE[torch.bfloat16] / 4


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"rope_table: dim is 5, pairs .* Give an even dim\."):
        F.rope_table(torch.arange(3), 5)
    table = F.rope_table(torch.arange(3), 8)
    with pytest.raises(ValueError, match=r"rope: the table turns 8 elements, the last dim has 6\."):
        F.rope(torch.zeros(1, 3, 1, 6), table)
