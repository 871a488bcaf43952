"""Mixed layouts: attention cut one way and the feed-forward layer another, in one model.

The same GPT block runs under three layouts of four ranks: everything over tp; heads over both mesh
axes and the feed-forward layer over one, with the batch on the other; and the reverse. Nobody
writes a transition: where the layouts of two neighbours differ, `shard` moves the activations, and
the plan shows at which line, how, and how many bytes.
"""

import torch

import megatree as mt

CONFIG = mt.GPTConfig(
    vocab_size=64, seq_length=16, num_layers=2, embed=32, kv_heads=4, head_dim=8, ffn=64
)
LAYOUTS = {
    "all over tp": mt.Layout(
        mt.Mesh(tp=4), mt.Rules(kv_heads="tp", ffn="tp", vocab="tp", seq_res="tp")
    ),
    "heads 4, feed-forward 2": mt.Layout(
        mt.Mesh(a=2, b=2), mt.Rules(kv_heads=("a", "b"), ffn="b", vocab="b", seq_res="b")
    ),
    "batch and heads 2, feed-forward 2": mt.Layout(
        mt.Mesh(a=2, b=2), mt.Rules(batch="a", kv_heads="b", ffn="b", vocab="b")
    ),
}
MODEL = mt.gpt(CONFIG, batch_size=4, dtype=torch.float64)


def loss(params, batch):
    """Return the mean loss of a batch."""
    _, outs = MODEL.apply(params, batch)
    total, weight = outs["loss"]["terms"]["loss"]
    return mt.shard(total, "") / mt.shard(weight, "").double()


def main() -> None:
    """Plan, simulate and run every layout on four processes."""
    generator = torch.Generator().manual_seed(0)
    params = mt.init(MODEL.params, MODEL.sizes, 0, dtype=torch.float64)
    tokens, labels = torch.randint(0, 64, (2, 4, 16), generator=generator)
    batch = {"tokens": tokens, "labels": labels, "weights": torch.ones(4, 16)}
    for name, layout in LAYOUTS.items():
        block = mt.lower_model(MODEL, layout).units["blocks.dense"].program
        moved = [c for c in block.collectives if c.phase != "sync"]
        print(f"{name}: a block moves {sum(c.bytes for c in moved) / 1024:.0f} KiB")
        for c in moved:
            print(f"  {c.source:20} {c.phase:9} {c.kind:14} over {'.'.join(c.axes)}")
        print(f"  {mt.verify(loss, layout, params, batch, axes=(MODEL.params, MODEL.batch))}")


if __name__ == "__main__":
    main()
