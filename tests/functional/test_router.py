"""Routers: the real cases of another implementation, and what it does that ours must not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import megatree.functional as F
from megatree.functional.router import (
    balance_loss,
    bias_move,
    capacity_of,
    router_z_loss,
    updated_bias,
)

# float32 there: the sums of 48 tokens in another order.
CLOSE: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-8}
CASES = (
    "softmax_topk", "softmax_pre_scaled", "softmax_top1_pre", "aux_z", "seq_aux",
    "global_aux_3steps", "three_aux", "sigmoid", "sigmoid_bias", "deepseek_group_limited",
    "softmax_group_limited_pre", "drop_probs", "drop_probs_pad", "sqrtsoftplus", "per_token_loss",
)  # fmt: skip


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    folder = shared / "goldens" / "router"
    if not folder.is_dir():
        pytest.skip(f"missing data: {folder} is no folder. Copy the goldens there.")
    return folder


def options(case: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `route` that a case's settings mean."""
    config = case["config"]
    return {
        "k": case["topk"],
        "score": config.get("moe_router_score_function", "softmax"),
        "pre_softmax": config.get("moe_router_pre_softmax", False),
        "scale": config.get("moe_router_topk_scaling_factor", 1.0),
        "groups": config.get("moe_router_num_groups"),
        "group_top_k": config.get("moe_router_group_topk"),
    }


def coefficients(config: dict[str, Any]) -> dict[str, float]:
    """Return kind of auxiliary loss -> coefficient."""
    kinds = config.get("moe_router_load_balancing_type", "aux_loss")
    values = config.get("moe_aux_loss_coeff", 0.0)
    kinds = kinds if isinstance(kinds, list) else [kinds]
    values = values if isinstance(values, list) else [values]
    return {kind: v for kind, v in zip(kinds, values, strict=True) if v}


def dense(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Return [batch, seq, experts], zero where an expert was not chosen, or dropped."""
    out = weights.new_zeros(*weights.shape[:-1], num_experts + 1)
    return out.scatter(-1, experts, weights)[..., :-1]


def by_token(x: Tensor) -> Tensor:
    """Return [batch, seq, ...] as their flat tokens lie: sequence first."""
    return x.transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_real_cases_of_megatron(name: str, goldens: Path) -> None:
    """Weights, choices, losses, their gradients, drops and the bias: all that the files hold."""
    case = json.loads((goldens / "cases.json").read_text())["cases"][name]
    arrays = {k: torch.from_numpy(v) for k, v in np.load(goldens / f"{name}.npz").items()}
    config, k, num_experts = case["config"], case["topk"], case["experts"]
    bias = arrays.get("expert_bias")
    seen: list[Tensor] = []
    per_step = []
    for m in range(case["micro_batches"]):
        logits = arrays["logits"][m].transpose(0, 1).clone().requires_grad_()  # [batch, seq, e]
        weights, experts = F.route(logits, bias, **options(case))
        kept = experts
        if factor := config.get("moe_expert_capacity_factor"):
            tokens = case["seq"] * case["batch"]
            capacity = capacity_of(tokens, k, num_experts, factor)
            assert capacity == arrays["capacity"].reshape(-1)[0] if "capacity" in arrays else True
            kept = F.drop_over_capacity(
                by_token(weights), by_token(experts), num_experts=num_experts, capacity=capacity
            )
            kept = kept.unflatten(0, (case["seq"], case["batch"])).transpose(0, 1)
        probs = by_token(dense(weights, kept, num_experts))
        torch.testing.assert_close(probs, arrays["probs"][m], **CLOSE)
        chosen = by_token(dense(torch.ones_like(weights), kept, num_experts)).bool()
        expected = arrays["routing_map"][m].bool()
        if config.get("moe_pad_expert_input_to_capacity"):
            expected = expected & (arrays["probs"][m] > 0)  # what fills an expert up has weight 0
        assert torch.equal(chosen, expected)
        main = torch.autograd.grad((probs * arrays["grad_probs"][m]).sum(), logits,
                                   retain_graph=True)[0]  # fmt: skip
        torch.testing.assert_close(main.transpose(0, 1), arrays["grad_logits_main"][m],
                                   rtol=2e-5, atol=1e-6)  # fmt: skip
        per_step.append(F.expert_counts(experts, num_experts=num_experts).sum(0))
        total: Any = 0.0
        scores = F.router_probabilities(logits, score=options(case)["score"])
        best = F.expert_counts(F.top_k(scores.detach(), k)[1], num_experts=num_experts)
        seen.append(best.sum(0))
        for kind, coefficient in coefficients(config).items():
            counts = {
                "aux_loss": best.sum(0),
                "seq_aux_loss": best,
                "global_aux_loss": torch.stack(seen).mean(0),
            }[kind]
            loss = balance_loss(scores, counts, k=k)
            logged = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss",
                      "global_aux_loss": "global_load_balancing_loss"}[kind]  # fmt: skip
            assert loss.item() == pytest.approx(case["losses"][logged][m], rel=2e-6)
            total = total + coefficient * loss
        if coefficient := config.get("moe_z_loss_coeff"):
            loss = router_z_loss(logits)
            assert loss.item() == pytest.approx(case["losses"]["z_loss"][m], rel=2e-6)
            total = total + coefficient * loss
        if isinstance(total, Tensor):
            if config.get("calculate_per_token_loss"):
                total = total * (case["seq"] * case["batch"])
            grad = torch.autograd.grad(total, logits)[0].transpose(0, 1)
            want = arrays["grad_logits_losses"][m]
            assert (grad - want).norm() < 1e-5 * want.norm()
    if "updated_expert_bias" in arrays:
        assert bias is not None
        counts = torch.stack(per_step)
        assert torch.equal(counts.cumsum(0), arrays["tokens_per_expert_accumulated"])
        assert torch.equal(updated_bias(bias, counts.sum(0)), arrays["updated_expert_bias"])


@pytest.mark.parametrize("name", ["sinkhorn_top1", "sinkhorn_top2"])
def test_the_real_cases_of_sinkhorn(name: str, goldens: Path) -> None:
    """The evened scores, the choice of them, weights that are those of the logits, gradients."""
    case = json.loads((goldens / "cases.json").read_text())["cases"][name]
    arrays = {k: torch.from_numpy(v) for k, v in np.load(goldens / f"{name}.npz").items()}
    logits = arrays["logits"][0].transpose(0, 1).clone().requires_grad_()
    even = F.sinkhorn(logits)
    assert not even.requires_grad
    torch.testing.assert_close(
        by_token(even), arrays["sinkhorn_normalised"][0], rtol=1e-5, atol=1e-9
    )
    chosen = F.top_k(even, case["topk"])[1]
    how: dict[str, Any] = {"score": "sigmoid"} if case["topk"] == 1 else {"pre_softmax": True}
    probs = by_token(dense(F.weigh(logits, chosen, **how), chosen, case["experts"]))
    torch.testing.assert_close(probs, arrays["probs"][0], **CLOSE)
    assert torch.equal(probs > 0, arrays["routing_map"][0].bool())
    grad = torch.autograd.grad((probs * arrays["grad_probs"][0]).sum(), logits)[0]
    torch.testing.assert_close(
        grad.transpose(0, 1), arrays["grad_logits_main"][0], rtol=2e-5, atol=1e-6
    )


def test_sinkhorn_evens_out_what_a_router_prefers() -> None:
    """All tokens prefer expert 0; the choice of evened scores is a quarter each."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 200, 4, generator=g, dtype=torch.float64)
    logits[..., 0] += 3.0
    plain = F.expert_counts(F.top_k(logits, 1)[1], num_experts=4).sum(0)
    even = F.sinkhorn(logits)
    counts = F.expert_counts(F.top_k(even, 1)[1], num_experts=4).sum(0)
    assert plain.max() > 300
    assert counts.max() < 150
    sums = even.sum((0, 1))
    torch.testing.assert_close(sums, torch.full((4,), 0.25).double(), rtol=1e-3, atol=0)


def test_weights_of_a_given_choice_are_those_of_the_router() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    for options in (
        {},
        {"pre_softmax": True, "normalise": True},
        {"score": "sigmoid", "scale": 2.5},
        {"score": "sqrtsoftplus"},
    ):
        weights, experts = F.route(logits, k=3, **options)  # type: ignore[arg-type]
        assert torch.equal(F.weigh(logits, experts, **options), weights)  # type: ignore[arg-type]


def test_jitter_is_even_in_its_range_and_a_function_of_its_key() -> None:
    x = torch.full((100, 100), 2.0, dtype=torch.float64)
    got = F.jitter(x, 7, rate=0.25) / 2
    assert 0.75 <= got.min() < 0.76
    assert 1.24 < got.max() < 1.25
    assert got.mean().item() == pytest.approx(1.0, abs=0.005)
    assert got.var().item() == pytest.approx(0.5**2 / 12, rel=0.02)
    assert torch.equal(got, F.jitter(x, 7, rate=0.25) / 2)
    assert not torch.equal(got, F.jitter(x, 8, rate=0.25) / 2)
    with pytest.raises(ValueError, match=r"jitter: rate is 1\.0\. Give a rate in \(0, 1\)\."):
        F.jitter(x, 7, rate=1.0)


def test_a_bias_moves_by_the_sign_of_what_its_expert_lacks() -> None:
    counts = torch.tensor([[5.0, 3.0, 4.0], [0.0, 0.0, 12.0]])
    expected = torch.tensor([[-0.5, 0.5, 0.0], [0.5, 0.5, -0.5]])
    assert torch.equal(bias_move(counts, rate=0.5), expected)


def test_routing_is_in_float32_whatever_the_logits() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, _ = F.route(logits, k=2)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, F.route(logits.float(), k=2)[0])
    assert F.route(logits.double(), k=2)[0].dtype == torch.float64


def test_a_bias_chooses_and_does_not_weigh() -> None:
    """A bias that moves weights would train the router towards it."""
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    bias = torch.tensor([-10.0, 0.0, 0.0], requires_grad=True)
    weights, experts = F.route(logits, bias, k=2, score="sigmoid", normalise=False)
    assert experts.tolist() == [[1, 2]]
    assert torch.equal(weights, torch.sigmoid(logits[:, 1:]))
    weights.sum().backward()
    assert bias.grad is None
    assert logits.grad is not None
    assert logits.grad[0, 0] == 0


def test_equal_weights_keep_the_earlier_tokens_whatever_their_order() -> None:
    """Drops by a top-k over ties are another choice on every device and length."""
    weights = torch.full((6, 1), 0.5)
    experts = torch.zeros(6, 1, dtype=torch.int64)
    kept = F.drop_over_capacity(weights, experts, num_experts=2, capacity=4)
    assert kept[:, 0].tolist() == [0, 0, 0, 0, 2, 2]
    weights[5] = 0.6  # the heaviest stays, wherever it stands
    kept = F.drop_over_capacity(weights, experts, num_experts=2, capacity=4)
    assert kept[:, 0].tolist() == [0, 0, 0, 2, 2, 0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 9}, r"route: k is 9, and there are 8 experts\. Choose from 1 to 8\."),
        ({"k": 1}, r"route: k is 1, and the softmax of one logit is 1 .* Set pre_softmax=True\."),
        ({"k": 2, "groups": 4}, r"route: groups is 4, group_top_k is None\. Give both or none\."),
        ({"k": 2, "groups": 3, "group_top_k": 1}, r"route: 1 of 3 groups of 8 experts\. Choose"),
        ({"k": 6, "groups": 4, "group_top_k": 2}, r"route: k is 6, over 2 groups of 2 experts\."),
        ({"k": 2, "score": "tanh"}, r"route: score is 'tanh'\. Use softmax, sigmoid or sqrt"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        F.route(torch.zeros(2, 8), **options)
