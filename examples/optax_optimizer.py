"""An optax optimizer drives our parameters: with gradients by torch, and all in JAX over a mesh.

Parameters are a plain tree of tensors, so any optimizer that takes a tree of arrays will do, and
`arrays_to_jax` and `arrays_from_jax` hand the tree over without a copy. Then JAX does all of it:
the same model through `to_jax`, its parameters and so optax's state cut over four devices by rules.
"""

import jax
import optax
import torch

import megatree as mt

CONFIG = mt.GPTConfig(
    vocab_size=64, seq_length=16, num_layers=1, embed=32, kv_heads=2, group=2, head_dim=8, ffn=64
)
MODEL = mt.gpt(CONFIG, batch_size=8, dtype=torch.float64)
LAYOUT = mt.Layout(mt.Mesh(dp=2, tp=2), mt.Rules(batch="dp", kv_heads="tp", ffn="tp", vocab="tp"))
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
TOKENS = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(0))
BATCH = {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "weights": torch.ones(8, 16)}


def loss(params, batch):
    """Return the mean loss of a batch."""
    total, weight = MODEL.apply(params, batch)[1]["loss"]["terms"]["loss"]
    return total / weight


def train(params, batch, value_and_grad):
    """Return the losses of five steps; parameters and gradients are JAX arrays."""
    state, losses = OPTIMIZER.init(params), []
    for _ in range(5):
        value, grads = value_and_grad(params, batch)
        updates, state = jax.jit(OPTIMIZER.update)(grads, state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
        losses.append(float(value))
    print(losses)
    return losses


def main() -> None:
    """Train twice and compare."""
    params = mt.init(MODEL.params, MODEL.sizes, seed=0, dtype=torch.float64)
    gradients = mt.value_and_grad(MODEL, mt.Layout())

    def by_torch(params, batch):
        terms, grads = gradients(mt.arrays_from_jax(params), [batch])
        return terms["loss"], mt.arrays_to_jax(grads)

    once = train(mt.arrays_to_jax(params), BATCH, by_torch)
    in_jax = jax.jit(jax.value_and_grad(mt.to_jax(loss, LAYOUT)))
    placed = mt.arrays_to_jax((params, BATCH), LAYOUT, (MODEL.params, MODEL.batch))
    torch.testing.assert_close(train(placed[0], placed[1], in_jax), once, rtol=1e-12, atol=0)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 4)
    main()
