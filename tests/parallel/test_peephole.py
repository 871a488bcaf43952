"""Constants made where they are used."""

import torch

from megatree.functional.annotate import shard
from megatree.parallel.layout import Layout, Rules
from megatree.parallel.mesh import Mesh
from megatree.parallel.scoped import iota
from megatree.parallel.simulate import simulate


def test_an_arange_that_is_cut_is_made_local() -> None:
    """Positions of a long sequence: each rank makes its own, with the right start."""

    def add_positions(x):
        return x + shard(torch.arange(3, 3 + 2 * x.shape[0], 2, device=x.device), "seq")

    layout = Layout(Mesh(cp=2, tp=2), Rules(seq=("tp", "cp")))
    x = torch.zeros(8, dtype=torch.float64)
    ran = simulate(add_positions, layout, x, axes=("seq",))
    torch.testing.assert_close(ran.value, torch.arange(3, 19, 2).double())
    targets = [node.target for node in ran.program.graph.nodes]
    assert iota in targets
    assert ran.counts == {}
