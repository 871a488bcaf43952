"""Ulysses against a ring: two ways to attend over a cut sequence, on the same model.

Mapping `seq` to a mesh axis is all that context parallelism takes; how attention is lowered is one
more entry of the rules. An all-to-all gives each rank some heads of the whole sequence (its bytes
fall as ranks are added, heads must divide); a ring hands keys and values round while they are used
(its bytes grow, few key heads make them small). Zigzag order gives every rank of a causal ring the
same work, and nothing in the model or its data says so. Results do not change.
"""

import torch

import megatree as mt
from megatree.parallel.plan.context import Attention, recommend
from megatree.parallel.threads import Threads

CONFIG = mt.GPTConfig(
    vocab_size=64, seq_length=64, num_layers=2, embed=32, kv_heads=4, group=2, head_dim=8, ffn=64
)


def layout(how):
    rules = mt.Rules(seq="cp", seq_res="cp", lower={"attention": how})
    return mt.Layout(mt.Mesh(cp=4), rules, order=mt.Zigzag())


def loss_of(model, where, comm=None):
    """Make one step; the batch is whole, and every rank takes its part."""
    step = mt.train_step(model, where, mt.adamw(1e-3), comm=comm)
    tokens = torch.randint(64, (2, 65), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "weights": torch.ones(2, 64)}
    _, metrics = step(step.init(0), [step.local(batch)])
    return metrics.loss.item()


def main() -> None:
    """Train a step on one device and on four simulated ranks, and show what travels."""
    model = mt.gpt(CONFIG, batch_size=2, dtype=torch.float64)
    alone = loss_of(model, mt.Layout())
    print(f"one device: loss {alone:.12f}")
    for how in (mt.Ulysses(), mt.Ring()):
        where = layout(how)
        block = mt.lower_model(model, where).units["blocks.dense"].program
        moved = {c.kind for c in block.collectives if c.phase != "sync"}
        losses = Threads({"cp": 4}).run(lambda comm, where=where: loss_of(model, where, comm))
        print(f"{how}: loss {losses[0]:.12f} on 4 ranks, by {', '.join(sorted(moved))}")
        assert max(abs(loss - alone) for loss in losses) < 1e-12 * alone
    print(recommend(Attention(batch=1, seq=131072, kv_heads=8, group=4, head_dim=128), 8))


if __name__ == "__main__":
    main()
