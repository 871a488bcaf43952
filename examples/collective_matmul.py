"""A collective matmul: the all-gather in front of a product, taken apart into a ring of hops.

Under sequence parallelism the input of a column-parallel product is gathered first. Here the body
multiplies the piece it holds while the next one is on its way (`ppermute`), so communication hides
under the products. `local_map` is the escape hatch for such schedules: ordinary Python on local
tensors, a comm that speaks logical axes, exact duals for the backward. `reference` is the same
function on whole tensors; the outputs' declaration (cut over `ffn`, whole over `seq`) is checked.
"""

import torch

import megatree as mt
import megatree.functional as F


def ring(comm, x, w):
    """Gather x along the sequence by hops; multiply every piece as it arrives."""
    n, me = comm.axis_size("seq"), comm.axis_index("seq")
    pieces = [None] * n
    for hop in range(n):
        pieces[(me - hop) % n] = torch.einsum("bsd,fd->bsf", x, w)
        if hop < n - 1:
            x = comm.ppermute(x, "seq", 1)
    return torch.cat(pieces, dim=1)


def gathered(x, w):
    """The same on whole tensors."""
    return torch.einsum("bsd,fd->bsf", x, w)


ring_matmul = mt.local_map(
    ring,
    in_axes=("batch seq embed", "ffn embed"),
    out_axes=mt.Out("batch whole_seq ffn"),
    reference=gathered,
)


def by_ring(w, x):
    return torch.tanh(ring_matmul(x, w["up"]))


def by_gather(w, x):
    return torch.tanh(F.linear(mt.shard(x, "batch whole_seq embed"), w["up"]))


def main() -> None:
    """Check both forms against one device, simulated and on four processes."""
    generator = torch.Generator().manual_seed(0)
    w = {"up": torch.randn(16, 8, dtype=torch.float64, generator=generator)}
    x = torch.randn(2, 12, 8, dtype=torch.float64, generator=generator)
    layout = mt.Layout(mt.Mesh(tp=4), mt.Rules(seq="tp", ffn="tp"))
    for fn in (by_ring, by_gather):
        print(mt.verify(fn, layout, w, x, axes=({"up": mt.Param("ffn embed")}, "batch seq embed")))


if __name__ == "__main__":
    main()
