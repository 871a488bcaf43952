"""A JAX layer inside a torch model, cut over a mesh, and the whole model in JAX.

`from_jax` makes a function of tensors of a JAX function (the apply of a Flax or Equinox layer):
compiled by JAX, gradients by JAX, memory shared. Its signature, given to `op`, is all that the
engine needs to cut it: `f+` is summed inside, so cutting the hidden units over tp leaves a pending
sum, which `shard` finishes, and `d!` must be whole. Every process runs the JAX function on its own
pieces. `to_jax` goes the other way: the same model, JAX layer included, becomes a JAX function,
which JAX differentiates, compiles and lays out by the same rules.
"""

import jax
import jax.numpy as jnp
import torch

import megatree as mt
from megatree import functional as F

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)


@mt.op("b t d!, f+ d!, f+ d! -> b t d!", linear=[[2]])
@mt.from_jax
def feed_forward(x, up, down):
    """Any JAX code."""
    hidden = jax.nn.gelu(jnp.einsum("btd,fd->btf", x, up))
    return jnp.einsum("btf,fd->btd", hidden, down)


def loss(w, x):
    """Return the mean square of a residual layer, a torch function."""
    y = shard_whole(F.rms_norm(x, w["norm"]))
    return shard_whole(x + shard_whole(feed_forward(y, w["up"], w["down"]))).square().mean()


def shard_whole(x):
    """Lay a value out along the batch, and finish its pending sums."""
    return mt.shard(x, "batch seq embed")


SIZES = {"batch": 4, "seq": 8, "embed": 16, "ffn": 32}
PARAMS = {"norm": mt.Param("embed"), "up": mt.Param("ffn embed"), "down": mt.Param("ffn embed")}
LAYOUT = mt.Layout(mt.Mesh(dp=2, tp=2), mt.Rules(batch="dp", ffn="tp"))


def main() -> None:
    """Plan, simulate and run the torch function on 4 processes; then run it in JAX on 4 devices."""
    w = mt.init(PARAMS, SIZES, seed=0, dtype=torch.float64)
    x = torch.randn(4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    print(mt.lower(loss, LAYOUT, PARAMS, mt.Array("batch seq embed"), sizes=SIZES).explain())
    print(mt.verify(loss, LAYOUT, w, x, axes=(PARAMS, "batch seq embed")))
    placed = mt.arrays_to_jax((w, x), LAYOUT, (PARAMS, "batch seq embed"))
    value = jax.jit(jax.value_and_grad(mt.to_jax(loss, LAYOUT)))(*placed)[0]
    print(f"in torch {loss(w, x).item():.15f}, in JAX on {LAYOUT.mesh} {float(value):.15f}")


if __name__ == "__main__":
    main()
