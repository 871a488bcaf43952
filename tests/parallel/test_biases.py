"""Products that add their bias: which do, and that results stay."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from megatree.models.gpt import gpt
from megatree.parallel.biases import product_and_bias, with_biases
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.model import lower_model
from megatree.parallel.nodes import operands
from megatree.runtime import forward
from tests.functional.check import rand
from tests.runtime.one_device import assert_like_one_device, reference
from tests.runtime.table import MODELS

GPT2 = MODELS["gpt2 tied"]


def folded(layout: Layout, *, dropout: float = 0.0) -> list[fx.Node]:
    model = gpt(replace(GPT2, dropout=dropout), batch_size=8, dtype=torch.float64)
    graph = with_biases(lower_model(model, layout).units["blocks.dense"].program.graph)
    graph.lint()
    return [node for node in graph.nodes if node.target is product_and_bias]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_products_that_end_a_branch_add_their_biases(dropout: float) -> None:
    made = folded(Layout(), dropout=dropout)
    assert [[x.name for x in operands(node)[1:]] for node in made] == [
        ["w_wo", "w_bo"],
        ["w_w_down", "w_b_down"],
    ]


def test_a_bias_that_follows_a_message_is_added_apart() -> None:
    """A bias in a pending sum would be added once per rank."""
    rules = Rules(kv_heads="tp", ffn="tp", vocab="tp", batch="dp")
    assert folded(Layout(Mesh(dp=2, tp=2), rules)) == []
    assert len(folded(Layout(Mesh(dp=2), rules))) == 2


def test_every_dim_of_a_weight_finds_its_place() -> None:
    x, w, b = rand(2, 3, 4, 5), rand(4, 5, 6, 7, seed=1), rand(6, 7, seed=2)
    expected = torch.einsum("abij,ijkl->abkl", x, w) + b
    torch.testing.assert_close(product_and_bias(x, w, b), expected, rtol=1e-13, atol=1e-13)


def test_gradients_are_those_of_one_device() -> None:
    assert_like_one_device(reference(GPT2), Layout(Mesh(dp=2), Rules(batch="dp")))


def test_that_check_sees_a_bias_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def loses(graph: fx.Graph) -> fx.Graph:
        graph = with_biases(graph)
        for node in graph.nodes:
            if node.target is product_and_bias:
                node.target = lambda x, weight, bias: product_and_bias(x, weight, 0 * bias)
        return graph

    monkeypatch.setattr(forward, "with_biases", loses)
    with pytest.raises(AssertionError):
        assert_like_one_device(reference(GPT2), Layout(Mesh(dp=2), Rules(batch="dp")))
