"""Two-dimensional tensor parallelism, by rules alone.

Both dims of every weight are cut, over a 2 x 2 mesh: `ffn` over x, `embed` over y. The first
product then sums over y and the second over x; `shard` finishes each sum where the model says so,
and the gradients' collectives follow. The model does not know: with other rules the same source is
plain (Megatron) tensor parallelism, which moves other bytes and gives the same numbers. The table
shows what each layout moves.
"""

import torch

import megatree as mt
import megatree.functional as F

PARAMS = {
    "norm": mt.Param("width"),
    "w_up": mt.Param("ffn embed"),
    "w_down": mt.Param("ffn embed"),
}
LAYOUTS = {
    "one-dimensional": mt.Layout(mt.Mesh(tp=4), mt.Rules(ffn="tp")),
    "two-dimensional": mt.Layout(mt.Mesh(x=2, y=2), mt.Rules(ffn="x", embed="y")),
    "two-dimensional, batch too": mt.Layout(
        mt.Mesh(x=2, y=2), mt.Rules(ffn="x", embed="y", batch="x")
    ),
}


def mlp(w, x):
    """Return x plus a feed-forward layer of it; x is whole along its width."""
    y = F.rms_norm(x, w["norm"])
    y = mt.shard(y, "rows seq embed")
    h = torch.tanh(mt.shard(F.linear(y, w["w_up"]), "rows seq ffn"))  # a sum over y ends here
    y = F.einsum("b t f, f d -> b t d", h, w["w_down"])  # a sum over x is pending
    return x + mt.shard(mt.shard(y, "rows seq embed"), "batch seq width")


def main() -> None:
    """Check every layout against one device, simulated and on four processes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weights = {"norm": random(16), "w_up": random(32, 16), "w_down": random(32, 16)}
    axes = (PARAMS, "batch seq width")
    for name, layout in LAYOUTS.items():
        found = mt.verify(mlp, layout, weights, random(4, 8, 16), axes=axes)
        moved = sum(c.bytes for c in found.program.collectives if c.phase != "sync")
        print(f"{name:28} {moved / 1024:6.1f} KiB moved per rank. {found}")


if __name__ == "__main__":
    main()
