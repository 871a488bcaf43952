"""Steps that cannot be a CUDA graph are refused before anything is made."""

import pytest
import torch

from megatree.models.gpt import GPTConfig, gpt
from megatree.parallel.comm import OneDevice
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.remat import Remat
from megatree.runtime.graphs import check_graphs
from megatree.runtime.optimizers import adamw
from megatree.runtime.step import train_step

CONFIG = GPTConfig(
    vocab_size=64, seq_length=8, num_layers=1, embed=16, kv_heads=2, head_dim=8, ffn=32
)


class OnGpu(OneDevice):
    """What is said of a GPU that is not there."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.device = torch.device("cuda")


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graphs: a step on cpu launches no kernels"):
        train_step(gpt(CONFIG, batch_size=2), Layout(), adamw(1e-3), graphs=True)


def test_several_ranks_and_offload_are_refused() -> None:
    check_graphs(Layout(), OnGpu())
    layout = Layout(Mesh(dp=2), Rules(batch="dp"))
    with pytest.raises(ValueError, match=r"cuda_graphs: .* has 2 ranks"):
        check_graphs(layout, OnGpu())
    with pytest.raises(ValueError, match="offloaded to the host"):
        check_graphs(Layout(remat=Remat(offload=True)), OnGpu())
